"""Adapters: small trained modules inside the frozen blocks. There is one file per family.

    kind                 class                what it is                                      source
    mm                   mm.py                two routed paths from one down-projection       paper 1, eq. 1-3
    concat               mm.py                two routed paths side by side                   paper 3, Table 3, rows 5-6
    rep                  bottleneck.py        one path                                        paper 1, section 3.1
    bottleneck           bottleneck.py        one path                                        paper 3, eq. 1-2
    bottleneck_weighted  bottleneck.py        two whole bottlenecks, routed                   paper 3, Table 3, row 11
    loha                 loha.py              two routed [D, D] matrices, each a LoHa         paper 3, Table 3, row 7
    loha_mm              loha.py              `mm` with a LoHa in place of each projection    paper 3, Table 3, row 8
    loha_silu            loha.py              one path of LoHas with a SiLU between           paper 3, Table 3, row 9
    lora                 lora.py              added to the LLM's query and value projections  paper 3, Table 3, row 10

Paper 1 is LaVIN. Paper 3 is "Enhancing Model Performance: Another Approach to Vision-Language Instruction Tuning". Its
Table 3 gives only a name and a score for each kind, and no code. "Our reading" in a docstring says how we fill the gap.

An adapter sits at an attachment point of a block, named in the recipe's key `at`. The block calls the adapter attached
there, if there is one. The points are the keys of the block's `adapters`, so they are part of the parameters' names.

    point            what the block computes there                      called as                  in
    attention        Attention(A(norm x))                               A(z_ND, token_MD, owner_N) LLM, ViT
    ffn              FFN(A(norm x))                                     A(z_ND, token_MD, owner_N) LLM, ViT
    after_attention  x + A(Attention(norm x))                           A(y_ND, token_MD, owner_N) LLM
    after_ffn        x + A(FFN(norm x))                                 A(y_ND, token_MD, owner_N) LLM
    beside_ffn       x + FFN(z) + A(z), z = norm x, adapted at `ffn`    A(z_ND, token_MD, owner_N) LLM
    projections      W_q z + A(z)["q"]; the same for k and v            A(z_ND)                    LLM

Points that no kind needs yet, and where they would go:

    W_o, W_1, W_2, W_3        llama.py, `Attention` and `FeedForward`: add there, as `Attention` adds to q, k and v
    extra keys and values     llama.py, `Attention.forward`: append them to the samples' own before attention
    an image memory           llama.py, `Rows`: a tensor [images, P, D] from the neck, for points that read it
    layers between layers     llama.py, `Llama.forward`: a call between blocks
    a side network            llama.py, `Llama.forward`: reads x_ND after every block
    extra input rows          lavin.py, `Lavin.embed`: exists, for the visual tokens of a neck (models/necks/)
    trained base tensors      trainable.py: the module that holds them derives from `Trainable`

A new kind is one file and one call of `register`. A recipe must be checked without importing torch, so `AdapterKind`
holds what the check needs, and this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavin_ds.models.kinds import Kind

if TYPE_CHECKING:
    from lavin_ds.config import AdapterConfig

ON_INPUT = ("attention", "ffn")
VISION_POINTS = ON_INPUT  # the points of a ViT block
LLM_POINTS = (*ON_INPUT, "after_attention", "after_ffn", "beside_ffn", "projections")


@dataclass(frozen=True)
class AdapterKind(Kind):
    """`check` takes an adapter's configuration and the width of its rows. It returns what is wrong, or None."""

    points: tuple[str, ...] = ON_INPUT  # the attachment points that it supports
    check: Callable[[AdapterConfig, int], str | None] | None = None

    def problems(self, config: AdapterConfig, width: int, points: tuple[str, ...]) -> list[str]:
        """What is wrong with an adapter of this kind in blocks of `width` features with these attachment points."""
        found = []
        possible = [point for point in self.points if point in points]
        if not possible:
            found.append(f"kind {config.kind} sits at {' or '.join(self.points)}, which these blocks do not have")
        elif set(config.at) - set(possible) or not config.at or len(set(config.at)) < len(config.at):
            found.append(
                f"at is [{', '.join(config.at)}]: kind {config.kind} needs one or more of {', '.join(possible)}, "
                "each once"
            )
        said = self.check(config, width) if self.check else None
        return found + ([said] if said else []) + self.wrong_options(config.kind, config.options)


KINDS: dict[str, AdapterKind] = {}


def register(name: str, kind: AdapterKind) -> None:
    """Makes `kind` available to recipes as `name`."""
    if name in KINDS or name == "none":
        raise ValueError(f"there is an adapter kind {name} already")
    KINDS[name] = kind


def groups_fit(config: AdapterConfig, width: int, halves: int = 1) -> str | None:
    """What is wrong if `groups` does not divide both the adapter's dim and the width of the rows; else None."""
    if config.dim % config.groups:
        return f"dim {config.dim} must be a multiple of groups {config.groups}"
    if width % (config.groups * halves):
        return f"{config.groups} groups of kind {config.kind} cannot split width {width}"
    return None


def groups_fit_halves(config: AdapterConfig, width: int) -> str | None:
    """As groups_fit, for kinds whose paths each produce half of the width."""
    return groups_fit(config, width, halves=2)


register("mm", AdapterKind(f"{__name__}.mm:MMAdapter", check=groups_fit))
register("concat", AdapterKind(f"{__name__}.mm:ConcatAdapter", check=groups_fit_halves))
register("rep", AdapterKind(f"{__name__}.bottleneck:RepAdapter", check=groups_fit))
register("bottleneck", AdapterKind(f"{__name__}.bottleneck:BottleneckAdapter", check=groups_fit))
register("bottleneck_weighted", AdapterKind(f"{__name__}.bottleneck:WeightedBottleneck", check=groups_fit))
register("loha", AdapterKind(f"{__name__}.loha:LohaAdapter"))
register("loha_mm", AdapterKind(f"{__name__}.loha:LohaMMAdapter", check=groups_fit))
register("loha_silu", AdapterKind(f"{__name__}.loha:LohaSiluAdapter", check=groups_fit))
register("lora", AdapterKind(f"{__name__}.lora:LoRA", points=("projections",)))
