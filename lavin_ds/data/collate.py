"""From rows to the tensors of a batch.

Dimensions: B samples, T tokens of the longest sample (packed: of all samples together), N images, S image side in
pixels, F rows that the ViT gives per image, W vision width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from lavin_ds.data.layout import IGNORE, Frame, Layout, lay_out
from lavin_ds.data.shards import Row

PADDING = 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Its samples are padded on the right to the longest one, or packed end to end in one row.

    An image that several samples share is stored once, as pixels or as cached features. `visual_start` is the index of
    the first visual token within each sample that has an image; None if no sample has one. `packed` is the length of
    each sample, and ids and labels are then [1, T]; None if each sample has its own row.

    The indices that the model needs are computed here, on the CPU. Computed on a GPU, they would make the host wait in
    every micro-batch.
    """

    ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, IGNORE where there is no label; not shifted: a label is at its own token
    image_B: torch.Tensor  # int64, index into images_NHWC or features_NFW, -1 for text
    images_NHWC: torch.Tensor | None  # uint8
    visual_start: int | None
    lengths_B: torch.Tensor  # int64, ids without padding
    row_ids: list[str]
    features_NFW: torch.Tensor | None = None  # float32
    packed: tuple[int, ...] | None = None
    # Among the B * T tokens of ids_BT: the first token of each sample; the sample of each token; its place in there.
    first_B: torch.Tensor = field(init=False)
    sample_N: torch.Tensor = field(init=False)
    place_N: torch.Tensor = field(init=False)
    # The start of each packed sample, and the end of the last one, int32 [B + 1]; None: padded.
    cu_seqlens: torch.Tensor | None = field(init=False)
    # The I samples that have an image: their indices, and the first visual token of each among the B * T.
    illustrated_I: torch.Tensor = field(init=False)
    visual_I: torch.Tensor = field(init=False)
    # The L labels: the token that predicts each, among the B * T, and the label itself.
    predicting_L: torch.Tensor = field(init=False)
    target_L: torch.Tensor = field(init=False)

    def __post_init__(self):
        B, T, device = len(self.image_B), self.ids_BT.shape[1], self.ids_BT.device
        if self.packed:
            first_B = self.lengths_B.cumsum(0) - self.lengths_B
            sample_N = torch.arange(B, device=device).repeat_interleave(self.lengths_B, output_size=T)
            cu_seqlens = torch.nn.functional.pad(self.lengths_B.cumsum(0), (1, 0)).int()
        else:
            first_B = torch.arange(B, device=device) * T
            sample_N = torch.arange(B, device=device).repeat_interleave(T)
            cu_seqlens = None
        illustrated_I = (self.image_B >= 0).nonzero().flatten()
        # Position i - 1 predicts token i. A sample's first token has no label, so no sample predicts another's.
        row_L, before_L = (self.labels_BT[:, 1:] != IGNORE).nonzero().unbind(1)
        derived = {
            "first_B": first_B,
            "sample_N": sample_N,
            "place_N": torch.arange(len(sample_N), device=device) - first_B[sample_N],
            "cu_seqlens": cu_seqlens,
            "illustrated_I": illustrated_I,
            "visual_I": first_B[illustrated_I] + (self.visual_start or 0),
            "predicting_L": row_L * T + before_L,
            "target_L": self.labels_BT[row_L, before_L + 1],
        }
        for name, tensor in derived.items():
            object.__setattr__(self, name, tensor)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; does not wait for the copy."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, so that a copy to a GPU runs while the GPU computes."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = copy(self)  # a new Batch would compute the indices again, on the device
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(changed, name, change(value))
        return changed


def collate(
    rows: Sequence[Row],
    image: Callable[[int], np.ndarray],
    frame: Frame,
    visual_tokens: int,
    packing: bool = False,
) -> Batch:
    """Makes a training batch of prompts, responses and EOS: padded, or with `packing` all samples in one row.

    `image` returns the uint8 pixels or float32 features of a Row.image: ShardReader.image or ShardReader.features. If
    visual_tokens is 0, every sample is laid out as text and no image is read.
    """
    layouts = [lay_out(r.token_ids, r.label_spans, r.image >= 0, frame, visual_tokens) for r in rows]
    return _batch(rows, layouts, image, visual_tokens, packing)


def prompt_batch(rows: Sequence[Row], image: Callable[[int], np.ndarray], frame: Frame, visual_tokens: int) -> Batch:
    """Makes an evaluation batch: prompts without responses and labels, ready to generate from."""
    none = np.zeros((0, 2), dtype=np.int32)
    layouts = [lay_out(r.prompt_ids, none, r.image >= 0, frame, visual_tokens) for r in rows]
    return _batch(rows, layouts, image, visual_tokens)


def _batch(
    rows: Sequence[Row],
    layouts: list[Layout],
    image: Callable[[int], np.ndarray],
    visual_tokens: int,
    packing: bool = False,
) -> Batch:
    lengths = [len(layout.ids) for layout in layouts]
    if packing:
        ids_BT = np.concatenate([layout.ids for layout in layouts])[None]
        labels_BT = np.concatenate([layout.labels for layout in layouts])[None]
    else:
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
    images = torch.from_numpy(np.stack([image(i) for i in slots])) if slots else None
    is_pixels = images is not None and images.dtype == torch.uint8
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        image_B=torch.tensor([slots.get(row.image, -1) for row in rows], dtype=torch.int64),
        images_NHWC=images if is_pixels else None,
        features_NFW=None if is_pixels else images,
        visual_start=max(layout.visual_start for layout in layouts) if slots else None,
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        row_ids=[row.id for row in rows],
        packed=tuple(lengths) if packing else None,
    )
