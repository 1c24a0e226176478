"""The lengths of a training set: read from shards, or assumed for ScienceQA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import check_manifest, load_manifest
from lavin_ds.errors import UserError
from lavin_ds.run import RunRecord


@dataclass(frozen=True)
class TrainingSet:
    """The properties of a training set that a run's time depends on."""

    lengths: np.ndarray  # [samples] positions, the modality token included
    image_fraction: float
    labelled_fraction: float  # of positions
    source: str


# ScienceQA's train split. The counts of samples and images are from paper 1, section 4.1, and the official
# problems.json. The lengths are assumed: the quantiles 0, 0.05, ..., 1 of 1,088 of its 12,726 samples (a real subset,
# biased towards hard items), with LLaMA's tokenizer, QCM-ALE and six visual tokens.
SCIENCEQA_SAMPLES = 12_726
SCIENCEQA_IMAGES = 6_218
LENGTH_QUANTILES = (
    *(49, 96, 174, 197, 212, 224, 240, 252, 264, 272),
    *(282, 289, 300, 320, 339, 366, 388, 428, 461, 493, 512),
)
LABELLED_FRACTION = 0.70  # of the positions of the same 1,088 samples


def scienceqa(max_length: int) -> TrainingSet:
    """ScienceQA's train split with the assumed lengths (mean 294 positions, if none is cut to max_length)."""
    rank = (np.arange(SCIENCEQA_SAMPLES) + 0.5) / SCIENCEQA_SAMPLES
    lengths = np.interp(rank, np.linspace(0, 1, len(LENGTH_QUANTILES)), LENGTH_QUANTILES).round().astype(int)
    return TrainingSet(
        lengths=np.minimum(lengths, max_length),
        image_fraction=SCIENCEQA_IMAGES / SCIENCEQA_SAMPLES,
        labelled_fraction=LABELLED_FRACTION,
        source="12,726 ScienceQA samples, lengths assumed from 1,088 of them",
    )


def from_shards(directory: Path, visual_tokens: int) -> TrainingSet:
    """The train split of a shard directory, with its actual lengths."""
    from lavin_ds.data.shards import ShardReader

    reader = ShardReader(directory, "train")
    rows = reader.trainable
    if not len(rows):
        raise UserError(f"{directory} has no training sample with a label. Prepare more data.")
    lengths = reader.lengths(visual_tokens)[rows] + 1
    return TrainingSet(
        lengths=lengths,
        image_fraction=float(reader.has_pixels[rows].mean()) if visual_tokens else 0.0,
        labelled_fraction=float(reader.label_counts[rows].sum() / lengths.sum()),
        source=f"{len(rows):,} samples of {directory}",
    )


def find_training_set(
    config: RunConfig, record: RunRecord | None = None, data: Path | None = None
) -> TrainingSet | None:
    """The shards in `data`; else the run's own shards if they suit the recipe; else ScienceQA, if the recipe is for it.

    Returns None if the lengths are not known.

    Raises:
        UserError: training would refuse the shards in `data`.
    """
    if data:
        if wrong := check_manifest(load_manifest(data), config):
            raise UserError(f"The shards in {data} are not for {config.name}: {'; '.join(wrong)}.")
    elif record and record.inputs.data.is_dir() and not check_manifest(load_manifest(record.inputs.data), config):
        data = record.inputs.data
    if data:
        return from_shards(data, config.model.visual_tokens)
    return scienceqa(config.data.max_length) if config.data.prompt_format.startswith("QCM") else None
