"""The micro-batch that a step is simulated or measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lavin_ds.config import ModelConfig, RunConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.sampler import micro_batches
from lavin_ds.errors import UserError

VISUAL_START = 4  # after BOS and the 3 tokens of "Image: " in LLaMA's tokenizer; the cost does not depend on it


@dataclass(frozen=True)
class Workload:
    """One micro-batch. All samples have `length` positions, including the modality token."""

    samples: int
    length: int
    image_fraction: float = 1.0  # of the samples
    labelled_fraction: float = 1.0  # of the positions, at the end of each sample

    def __post_init__(self):
        if self.samples < 1 or self.length < 2:
            raise UserError(
                f"A micro-batch needs at least 1 sample of at least 2 positions: got {self.samples} of {self.length}."
            )
        for name in ("image_fraction", "labelled_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1.")

    @property
    def images(self) -> int:
        return round(self.samples * self.image_fraction)


def worst_case(config: RunConfig, gpus: int | None = None, length: int | None = None) -> Workload:
    """The micro-batch that sets the peak: full length, an image in every sample, a label in every position.

    It has as many samples as a rank gets when a global batch of such samples is divided: at most `micro_batch`, fewer
    with many ranks. gpus: by default one model's (tensor_parallel).
    """
    training = config.training
    ranks = (gpus or config.tensor_parallel) // config.tensor_parallel
    shares = ranks * micro_batches(training.global_batch, ranks, training.micro_batch)
    return Workload(
        samples=math.ceil(training.global_batch / shares),
        length=length or config.data.max_length,
        image_fraction=1.0 if config.model.vision else 0.0,
    )


def make_batch(model: ModelConfig, workload: Workload, packing: bool = False) -> Batch:
    """A micro-batch of zeros of that shape. One row per sample, or one row in all if packed. Images come first."""
    B, T = workload.samples, workload.length - 1  # the model adds the modality token before the ids
    labelled = min(T, round(workload.length * workload.labelled_fraction))
    images = workload.images if model.vision else 0
    needed = VISUAL_START + model.visual_tokens
    if images and workload.length <= needed:
        raise UserError(f"Samples of length {workload.length} have no room for {model.visual_tokens} visual tokens.")
    labels_BT = torch.full((B, T), IGNORE)
    labels_BT[:, T - labelled :] = 0
    size = model.vision.image_size if images else 0
    rows = (1, -1) if packing else (B, T)
    return Batch(
        ids_BT=torch.zeros(B, T, dtype=torch.int64).view(rows),
        labels_BT=labels_BT.view(rows),
        image_B=torch.tensor([b if b < images else -1 for b in range(B)]),
        images_NHWC=torch.zeros(images, size, size, 3, dtype=torch.uint8) if images and model.has_vit else None,
        features_NFW=torch.zeros(images, model.vision.rows, model.vision.width)
        if images and not model.has_vit
        else None,
        visual_start=VISUAL_START if images else None,
        lengths_B=torch.full((B,), T),
        row_ids=[str(b) for b in range(B)],
        packed=(T,) * B if packing else None,
    )
