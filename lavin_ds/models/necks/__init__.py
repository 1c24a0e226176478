"""Necks: map the vision tower's rows to visual tokens of the LLM's width. There is one file per family.

    kind    class       visual tokens  what it is                                        source
    lavin   rowwise.py  one per row    a bottleneck with a SiLU                          paper 1, eq. 6
    linear  rowwise.py  one per row    one projection                                    LLaVA (arXiv:2304.08485), eq. 1

A new kind is one file and one call of `register`. The neck determines the number of visual tokens per image. A recipe
must be checked without importing torch, so `NeckKind` computes that number, and this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavin_ds.models.kinds import Kind

if TYPE_CHECKING:
    from lavin_ds.config import NeckConfig


def one_per_row(config: NeckConfig, rows: int) -> int:
    return rows


@dataclass(frozen=True)
class NeckKind(Kind):
    """`visual_tokens` maps the neck's configuration and the tower's rows per image to visual tokens per image."""

    visual_tokens: Callable[[NeckConfig, int], int] = one_per_row


KINDS: dict[str, NeckKind] = {}


def register(name: str, kind: NeckKind) -> None:
    """Makes `kind` available to recipes as `name`."""
    if name in KINDS:
        raise ValueError(f"there is a neck kind {name} already")
    KINDS[name] = kind


register("lavin", NeckKind(f"{__name__}.rowwise:LavinNeck"))
register("linear", NeckKind(f"{__name__}.rowwise:LinearNeck"))
