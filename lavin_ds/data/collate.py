"""From rows to the tensors of a batch.

B samples, T tokens of the longest, N images, S their side in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lavin_ds.data.layout import IGNORE, Frame, Layout, lay_out
from lavin_ds.data.shards import Row

PADDING = 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right to its own longest sample.

    An image that several samples show is there once. `visual_start` is the index in ids_BT of the first
    visual token of every sample with an image; None if no sample has one.
    """

    ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, IGNORE where there is no label; labels stand at their own token
    image_B: torch.Tensor  # int64, index into images_NHWC, -1 for text
    images_NHWC: torch.Tensor | None  # uint8
    visual_start: int | None
    lengths_B: torch.Tensor  # int64, ids without padding
    row_ids: list[str]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; does not wait for the copy."""
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def collate(rows: Sequence[Row], image: Callable[[int], np.ndarray], frame: Frame, visual_tokens: int) -> Batch:
    """Training batch: prompt, response, EOS. `image` gives pixels by Row.image, such as ShardReader.image.

    With visual_tokens 0 every sample is laid out as text and no image is read.
    """
    layouts = [lay_out(r.token_ids, r.label_spans, r.image >= 0, frame, visual_tokens) for r in rows]
    return _batch(rows, layouts, image, visual_tokens)


def prompt_batch(rows: Sequence[Row], image: Callable[[int], np.ndarray], frame: Frame, visual_tokens: int) -> Batch:
    """Evaluation batch: prompts alone, no label, ready to generate from."""
    none = np.zeros((0, 2), dtype=np.int32)
    layouts = [lay_out(r.prompt_ids, none, r.image >= 0, frame, visual_tokens) for r in rows]
    return _batch(rows, layouts, image, visual_tokens)


def _batch(rows: Sequence[Row], layouts: list[Layout], image: Callable[[int], np.ndarray], visual_tokens: int) -> Batch:
    lengths = [len(layout.ids) for layout in layouts]
    ids_BT = np.full((len(rows), max(lengths)), PADDING, dtype=np.int64)
    labels_BT = np.full_like(ids_BT, IGNORE)
    for b, layout in enumerate(layouts):
        ids_BT[b, : lengths[b]] = layout.ids
        labels_BT[b, : lengths[b]] = layout.labels
    slots: dict[int, int] = {}  # image table row -> index among this batch's images
    if visual_tokens:
        for row in rows:
            if row.image >= 0:
                slots.setdefault(row.image, len(slots))
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        image_B=torch.tensor([slots.get(row.image, -1) for row in rows], dtype=torch.int64),
        images_NHWC=torch.from_numpy(np.stack([image(i) for i in slots])) if slots else None,
        visual_start=max(layout.visual_start for layout in layouts) if slots else None,
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        row_ids=[row.id for row in rows],
    )
