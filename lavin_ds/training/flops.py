"""Which share of the device's peak arithmetic a step reaches, where that peak is known.

Counted are the products with frozen matrices that the step's own tokens need: forward, and backward to the activations,
which costs as much; frozen weights get no gradient. Not counted are attention (some 4% at 512 tokens of 7B), adapters,
padding and recomputed activations: what is spent on those lowers the share.
"""

from __future__ import annotations

import re

import torch

from lavin_ds.config import LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.devices import DEVICES

OPERATIONS = 4  # a weight and token: multiply and add, forward and backward


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
    """Operations a second that the data sheet promises in bf16; None for a CPU or an unknown GPU."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The same by the driver's name, for example "NVIDIA A100-SXM4-80GB"."""
    for device in DEVICES.values():
        model = re.sub(r"-\d+g$", "", device.name).replace("-", " ")  # memory sizes share a peak
        if re.search(rf"\b{model}\b", name.lower()):
            return device.tflops * 1e12
    return None
