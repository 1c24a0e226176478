"""A small random LaVIN, a tokenizer of single letters for it, and its answers computed without the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lavin_ds
from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import prompt_batch
from lavin_ds.data.layout import Frame
from lavin_ds.data.shards import Row
from lavin_ds.generation.request import Answer, Request
from lavin_ds.models.lavin import Lavin

ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"  # the base that ships
VOCABULARY = 96
ADAPTER = AdapterConfig(kind="mm", dim=4, temperature=1.0)
CONFIG = ModelConfig(
    llm=LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCABULARY),
    vision=VisionConfig(width=16, layers=2, heads=2, patch_size=8, image_size=16, readout={"every": 1}),
    llm_adapter=ADAPTER,
    vision_adapter=ADAPTER,
    neck={"dim": 8},
    frozen_dtype="fp32",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


class Letters:
    """Id 30 + n is the n-th letter; 1 and 2 are BOS and EOS. What the engine needs of a tokenizer, and no more."""

    bos_id, eos_id, vocab_size, adds_space = 1, 2, VOCABULARY, False

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) % 20 for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") - 30 + id) if id >= 30 else "." for id in ids)


def small_lavin(compat: bool = False) -> Lavin:
    """Every parameter drawn anew, large enough that neighbouring logits differ clearly."""
    model = Lavin(CONFIG, compat)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or ".ln_" in name
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if norm or parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.copy_(norm + scale * values)
    return model.eval()


def random_requests(count: int, seed: int = 0, **settings) -> list[Request]:
    """Prompts of 1 to 40 tokens, some of which begin alike; a third of them with one of three images."""
    random = np.random.default_rng(seed)
    preset = random.integers(9, VOCABULARY, 36)
    requests = []
    for number in range(count):
        prompt = random.integers(9, VOCABULARY, random.integers(1, 40))
        if number % 4 == 0:
            prompt = np.concatenate([preset, prompt[:9]])
        image = IMAGES[number % 9 // 3] if number % 3 == 0 else None
        wanted = int(random.integers(1, 12))
        requests.append(Request(f"r{number}", prompt, image, max_new_tokens=wanted, **settings))
    return requests


def forward_logits(model: Lavin, request: Request, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of a request's whole sequence followed by `ids`, by the pass that trains: no cache, no packing."""
    tokens = np.concatenate([request.prompt_ids, np.asarray(ids, np.int64)]).astype(np.int32)
    image = -1 if request.image is None else 0
    row = Row(request.id, tokens, np.zeros((0, 2), np.int32), tokens, image, image >= 0, False, 0, 2, "", "")
    batch = prompt_batch([row], lambda index: request.image, Frame.of(Letters()), model.config.visual_tokens)
    with torch.no_grad():
        return model.llm.logits(model.hidden(batch)[0])


def one_by_one(model: Lavin, request: Request) -> list[int]:
    """The greedy answer, the whole sequence computed anew for each token."""
    ids: list[int] = []
    while len(ids) < request.max_new_tokens:
        id = int(forward_logits(model, request, ids)[-1].argmax())
        if id == Letters.eos_id:
            break
        ids.append(id)
    return ids


def is_greedy(model: Lavin, request: Request, answer: Answer) -> bool:
    """Whether `one_by_one` gives this answer: each of its tokens is the likeliest after those before it.

    One pass shows it, as no token sees a later one.
    """
    ids = [*answer.ids, Letters.eos_id] if answer.finish == "eos" else answer.ids
    likeliest = forward_logits(model, request, ids)[-len(ids) - 1 : -1].argmax(-1).tolist()
    return ids == likeliest and (answer.finish == "eos" or len(ids) == request.max_new_tokens)
