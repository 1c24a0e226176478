"""Refuses a base that is built like a LLaMA and computes something else, from its JSON and its tensors' names.

Its weights would load, and the model would answer nonsense without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lavin_ds.errors import UserError

# Hugging Face's model_type of models that compute what LLaMA does as long as PLAIN holds; what transformers takes for
# keys that a config.json lacks, where that is not plain.
MODEL_TYPES: dict[str, dict] = {"llama": {}, "mistral": {"sliding_window": 4096}}

# Constants that old files carry along: the model computes them itself. Any other tensor must have a use.
IGNORABLE = re.compile(r"rope\.freqs$|rotary_emb\.inv_freq$")

OFF = (None, False, 0)
# Keys of config.json or params.json: the values of a plain LLaMA, and what another value means.
PLAIN: dict[str, tuple[tuple, str]] = {
    "hidden_act": ((None, "silu", "swish"), "another activation"),
    "attention_bias": (OFF, "biases in attention"),
    "qkv_bias": (OFF, "biases in attention"),
    "mlp_bias": (OFF, "biases in the feed-forward layers"),
    "bias": (OFF, "biases"),
    "use_bias": (OFF, "biases"),
    "qk_norm": (OFF, "norms of queries and keys"),
    "use_qk_norm": (OFF, "norms of queries and keys"),
    "qk_layernorm": (OFF, "norms of queries and keys"),
    "sliding_window": (OFF, "a token sees only that many before it"),
    "attention_chunk_size": (OFF, "a token sees only its own chunk"),
    "no_rope_layers": (OFF, "layers without rotary positions"),
    "nope_layer_interval": (OFF, "layers without rotary positions"),
    "partial_rotary_factor": ((None, 1), "a part of every head without rotary positions"),
    "attn_logit_softcapping": (OFF, "capped attention scores"),
    "final_logit_softcapping": (OFF, "capped logits"),
    "num_local_experts": ((*OFF, 1), "a mixture of experts"),
    "num_experts": ((*OFF, 1), "a mixture of experts"),
    "n_routed_experts": (OFF, "a mixture of experts"),
    "moe": (OFF, "a mixture of experts"),
    "moe_args": (OFF, "a mixture of experts"),
    "embedding_multiplier": ((None, 1), "scaled embeddings"),
    "residual_multiplier": ((None, 1), "scaled sub-layers"),
    "attention_multiplier": ((None,), "another scale of attention scores"),
    "logits_scaling": ((None, 1), "scaled logits"),
    "quantization_config": ((None,), "quantised weights, in a format that is not read"),
}


def check_description(file: Path, described: dict) -> None:
    """Checks what a base's config.json or params.json says. Keys that it lacks have their plain value.

    Raises:
        UserError: it describes something else than a LLaMA; the key and what it means are named.
    """
    kind = described.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(
            f"{file} has model_type {kind!r}: the model here computes what {' and '.join(MODEL_TYPES)} do, and would "
            "make nonsense of these weights. Give a base of one of those types."
        )
    described = MODEL_TYPES[kind] | described
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    if isinstance(rope, dict) and "partial_rotary_factor" in rope:
        described = described | {"partial_rotary_factor": rope["partial_rotary_factor"]}
    for key, (plain, meaning) in PLAIN.items():
        if described.get(key) not in plain:
            raise _not_computed(file, key, described[key], meaning)
    layers = described.get("layer_types") or []
    if any(layer != "full_attention" for layer in layers):
        raise _not_computed(file, "layer_types", layers, "layers whose tokens do not see all those before them")
    width, heads, head = (
        next((described[key] for key in keys if isinstance(described.get(key), int)), None)
        for keys in (("hidden_size", "dim"), ("num_attention_heads", "n_heads"), ("head_dim",))
    )
    if width and heads and head and head * heads != width:
        raise _not_computed(file, "head_dim", head, f"heads that are not {width} / {heads} features wide")


def _not_computed(file: Path, key: str, value: object, meaning: str) -> UserError:
    return UserError(
        f"{file} has {key} {value!r}: {meaning}. The LLaMA here does not compute that. Give a base without it."
    )


def check_tensors(path: Path, unused: Iterable[str]) -> None:
    """Refuses tensors that the model has no use for: what they do, it would not compute.

    Raises:
        UserError: there are some that are not IGNORABLE; they are named.
    """
    unused = [name for name in unused if not IGNORABLE.search(name)]
    if unused:
        raise UserError(
            f"{path} has {len(unused)} tensors that a LLaMA of the recipe's model.llm does not use: {some(unused)}. "
            "Without them the model would compute something else than it was trained to. Give a base that is a plain "
            "LLaMA, or check the recipe's model.llm."
        )


def some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
