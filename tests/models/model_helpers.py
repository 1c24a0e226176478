"""A small LaVIN with values everywhere, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, VisionConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.models.adapters import KINDS

VISUAL_START = 3
ADAPTER = AdapterConfig(kind="mm", dim=4, dropout=0.1, temperature=2.0)
CONFIG = ModelConfig(
    llm=LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64),
    vision=VisionConfig(width=32, layers=2, heads=4, patch_size=8, image_size=16, readout={"every": 1}),
    llm_adapter=ADAPTER,
    vision_adapter=ADAPTER,
    neck={"dim": 8},
    frozen_dtype="fp32",
)


def _variant(llm: str, vision: str) -> ModelConfig:
    adapters = {
        place: {"kind": kind, "dim": 4, "at": ["projections"] if kind == "lora" else ["attention", "ffn"]}
        for place, kind in (("llm_adapter", llm), ("vision_adapter", vision))
    }
    return ModelConfig.model_validate(CONFIG.model_dump() | adapters)


# Models with every kind of adapter, by the LLM's: before attention and feed-forward where they can stand there.
PAIRS = {"bottleneck_weighted": "concat", "concat": "bottleneck_weighted", "lora": "rep"}
VARIANTS = {kind: _variant(kind, PAIRS.get(kind, kind)) for kind in KINDS if kind != "rep"}


def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Values for every parameter, adapters included, far enough from zero that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or ".ln_" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            else:
                parameter.copy_(values / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.1 * values)
    return model


def make_batch(rows: Sequence[tuple[int, int]], padding: int = 0, seed: int = 0) -> Batch:
    """Samples of (length, image), image -1 for text; a sample's own tokens follow from its length and image.

    `padding` more positions stand behind the longest.
    """
    width = max(length for length, _ in rows) + padding
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for b, (length, image) in enumerate(rows):
        generator = torch.Generator().manual_seed(seed * 10_000 + length * 100 + image + 1)
        ids_BT[b, :length] = torch.randint(3, CONFIG.llm.vocab_size, (length,), generator=generator)
        labels_BT[b, length // 2 : length] = ids_BT[b, length // 2 : length]
    kept = sorted({image for _, image in rows if image >= 0})
    pictures = [
        torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(99 + image))
        for image in kept
    ]
    return Batch(
        ids_BT=ids_BT,
        labels_BT=labels_BT,
        image_B=torch.tensor([kept.index(image) if image >= 0 else -1 for _, image in rows]),
        images_NHWC=torch.stack(pictures) if kept else None,
        visual_start=VISUAL_START if kept else None,
        lengths_B=torch.tensor([length for length, _ in rows]),
        row_ids=[str(b) for b in range(len(rows))],
    )


def pack(batch: Batch) -> Batch:
    """The samples of a padded batch end to end in one row."""
    lengths = batch.lengths_B.tolist()
    ids, labels = (
        torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])[None]
        for padded in (batch.ids_BT, batch.labels_BT)
    )
    return replace(batch, ids_BT=ids, labels_BT=labels, packed=tuple(lengths))
