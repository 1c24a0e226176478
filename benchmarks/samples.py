"""Training samples with ScienceQA's lengths and random ids and pixels. No data set is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavin_ds.config import ModelConfig
from lavin_ds.data.layout import Frame
from lavin_ds.data.shards import Row

# Positions per sample, including modality token and visual tokens: the quantiles 0, 0.05, ..., 1 of the 1,043 trainable
# records in split train of a subset of ScienceQA (1,088 records, 547 with an image). `lavin-ds prep scienceqa --recipe
# lavin-7b` made them with LLaMA's tokenizer (QCM-ALE, at most 512). Mean 303, median 284.
SCIENCEQA_LENGTHS = (49, 163, 190, 208, 219, 233, 246, 257, 268, 277, 284)
SCIENCEQA_LENGTHS += (293, 304, 324, 349, 370, 392, 430, 464, 493, 512)
IMAGE_FRACTION = 0.49  # of ScienceQA's train split
LABELLED_FRACTION = 0.7  # of a sample's positions; these are at its end
MICRO_BATCH = 4  # the paper's global batch of 32 on 8 GPUs
FRAME = Frame(bos=1, prefix_image=(3, 4, 5), prefix_text=(3, 4, 5, 6, 7))  # as long as with LLaMA's tokenizer


def real_lengths(count: int) -> list[int]:
    """`count` evenly spaced quantiles of the distribution, so that even a few samples have its spread."""
    at = (np.arange(count) + 0.5) / count
    table = np.linspace(0, 1, len(SCIENCEQA_LENGTHS))
    return np.interp(at, table, SCIENCEQA_LENGTHS).round().astype(int).tolist()


def make_samples(model: ModelConfig, lengths: Sequence[int], image_fraction: float) -> tuple[list[Row], np.ndarray]:
    """Samples with these lengths and random ids, as rows of a shard, and their images [count, S, S, 3]."""
    draw, count = np.random.default_rng(0), len(lengths)
    shown = draw.permutation(count) < round(image_fraction * count)
    rows = []
    for number, place in enumerate(draw.permutation(count)):
        has_image = bool(shown[number])
        own = lengths[place] - 1 - len(FRAME.head(has_image, model.visual_tokens))
        ids = draw.integers(10, model.llm.vocab_size, own, dtype=np.int32)
        start = max(1, own - round(LABELLED_FRACTION * lengths[place]))
        spans = np.array([[start, own]], dtype=np.int32)
        image = number if has_image else -1
        rows.append(Row(str(number), ids, spans, ids[:start], image, has_image, False, 0, 2, "", ""))
    size = model.vision.image_size
    return rows, draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
