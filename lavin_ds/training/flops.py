"""The share of a GPU's peak FLOP/s that a step reaches (model FLOP utilisation).

It counts the products with frozen matrices for the step's tokens: forward, and the gradient of the activations, which
costs the same. Frozen weights have no gradient. It does not count attention (about 4% at 512 tokens and 7B), adapters,
padding and recomputed activations, so time spent on them lowers the share.
"""

from __future__ import annotations

import torch

from lavin_ds.config import LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.devices import find_device

OPERATIONS = 4  # per weight and token: a multiplication and an addition, in forward and in backward


def step_flops(model: ModelConfig, tokens: int, labelled_tokens: int, images: int) -> float:
    """Floating-point operations of a step. `tokens` is without padding."""
    flops = OPERATIONS * (_layer_weights(model.llm) * tokens + model.llm.dim * model.llm.vocab_size * labelled_tokens)
    if model.has_vit:
        flops += OPERATIONS * _image_products(model.vision) * images
    return flops


def _layer_weights(llm: LlamaConfig) -> int:
    attention = 2 * llm.dim * llm.dim + 2 * llm.dim * llm.kv_heads * llm.head_dim
    return llm.n_layers * (attention + 3 * llm.dim * llm.ffn_dim)


def _image_products(vision: VisionConfig) -> int:
    """Weights times tokens in the ViT's blocks, for one image."""
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    weights = 4 * vision.width**2 + 2 * vision.width * int(vision.width * vision.mlp_ratio)
    return vision.depth * weights * tokens


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s by the device's data sheet; None for a CPU, or a GPU whose data sheet is not in devices.py."""
    if device.type != "cuda":
        return None
    sheet = find_device(torch.cuda.get_device_name(device))
    return sheet and sheet.tflops * 1e12
