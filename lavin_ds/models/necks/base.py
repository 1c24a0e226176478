"""What a neck is, and building the one of a recipe.

Dimensions: N images, F rows of an image from the vision tower, W vision width, P visual tokens, D model width.
"""

from __future__ import annotations

import torch

from lavin_ds.config import NeckConfig, VisionConfig
from lavin_ds.models.necks import KINDS
from lavin_ds.models.trainable import Trainable


class Neck(Trainable):
    """Rows of images [N, F, W] in, visual tokens [N, P, D] out; N may be 0. Parameters are fp32."""

    def __init__(self, config: NeckConfig, vision: VisionConfig, width: int):
        """width: D."""
        super().__init__()
        self.config = config

    def forward(self, x_NFW: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def build_neck(config: NeckConfig, vision: VisionConfig, width: int) -> Neck:
    """The neck of a recipe between its vision tower and an LLM of `width`."""
    return KINDS[config.kind].load()(config, vision, width)
