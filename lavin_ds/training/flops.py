"""The share of a GPU's peak rate that a step reaches (model FLOP utilisation).

Counted are the products with frozen matrices for the step's own tokens: forward, and backward to the activations, which
costs as much; frozen weights get no gradient. Attention (about 4% at 512 tokens of 7B), adapters, padding and
recomputed activations are not counted, so time spent on them lowers the share.
"""

from __future__ import annotations

import torch

from lavin_ds.config import LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.devices import find_device

OPERATIONS = 4  # per weight and token: multiply and add, forward and backward


def step_flops(model: ModelConfig, tokens: int, labelled_tokens: int, images: int) -> float:
    """Floating-point operations of a step whose samples hold `tokens`, without padding."""
    flops = OPERATIONS * (_layer_weights(model.llm) * tokens + model.llm.dim * model.llm.vocab_size * labelled_tokens)
    if model.has_vit:
        flops += OPERATIONS * _image_products(model.vision) * images
    return flops


def _layer_weights(llm: LlamaConfig) -> int:
    attention = 2 * llm.dim * llm.dim + 2 * llm.dim * llm.kv_heads * llm.head_dim
    return llm.n_layers * (attention + 3 * llm.dim * llm.ffn_dim)


def _image_products(vision: VisionConfig) -> int:
    """Products of a weight and a token in the blocks of the ViT."""
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    weights = 4 * vision.width**2 + 2 * vision.width * int(vision.width * vision.mlp_ratio)
    return vision.depth * weights * tokens


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the data sheet of the device states for bf16; None for a CPU, or a GPU without a data sheet here."""
    if device.type != "cuda":
        return None
    sheet = find_device(torch.cuda.get_device_name(device))
    return sheet and sheet.tflops * 1e12
