"""Refuses a base model that looks like a LLaMA but computes something else. It reads only JSON and tensor names.

Without this check the weights of such a base would load, and the model would generate nonsense without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lavin_ds.errors import UserError

# Hugging Face's model_types that compute the same as LLaMA if all keys are PLAIN. Each comes with the defaults of
# transformers that are not plain, for keys that its config.json lacks.
MODEL_TYPES: dict[str, dict] = {"llama": {}, "mistral": {"sliding_window": 4096}}

# Constants in old files that the model computes itself. The model must use every other tensor.
IGNORABLE = re.compile(r"rope\.freqs$|rotary_emb\.inv_freq$")

OFF = (None, False, 0)
# Keys of config.json or params.json: their values in a plain LLaMA, and the meaning of any other value.
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
    "sliding_window": (OFF, "a token sees only that many tokens before it"),
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
    "quantization_config": ((None,), "quantised weights, in a format that lavin_ds does not read"),
}


def check_description(file: Path, described: dict) -> None:
    """Checks the content of a base's config.json or params.json. A missing key counts as plain.

    Raises:
        UserError: it does not describe a plain LLaMA. The error names the key and its meaning.
    """
    kind = described.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(
            f"{file} has model_type {kind!r}, but lavin_ds computes only what {' and '.join(MODEL_TYPES)} do. With "
            "these weights the model would generate nonsense. Give a base of one of those types."
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
        raise _not_computed(file, "layer_types", layers, "layers whose tokens do not see all tokens before them")
    width, heads, head = (
        next((described[key] for key in keys if isinstance(described.get(key), int)), None)
        for keys in (("hidden_size", "dim"), ("num_attention_heads", "n_heads"), ("head_dim",))
    )
    if width and heads and head and head * heads != width:
        raise _not_computed(file, "head_dim", head, f"heads whose width is not {width} / {heads}")


def _not_computed(file: Path, key: str, value: object, meaning: str) -> UserError:
    return UserError(
        f"{file} has {key} {value!r}: {meaning}. The LLaMA here does not compute that. Give a base without it."
    )


def check_tensors(path: Path, unused: Iterable[str]) -> None:
    """Refuses tensors that the model would not use, since it would then not compute what it was trained to.

    Raises:
        UserError: there are unused tensors that are not IGNORABLE. The error names them.
    """
    unused = [name for name in unused if not IGNORABLE.search(name)]
    if unused:
        raise UserError(
            f"{path} has {len(unused)} tensors that a LLaMA of the recipe's model.llm does not use: {some(unused)}. "
            "Without them the model would not compute what it was trained to. Give a base that is a plain LLaMA, or "
            "check the recipe's model.llm."
        )


def some(names: list[str], most: int = 3) -> str:
    """The first `most` names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
