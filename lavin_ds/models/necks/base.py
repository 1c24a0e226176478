"""Base class of the necks, and a function that builds a recipe's neck.

Dimensions: N images, F rows per image from the vision tower, W vision width, P visual tokens per image, D model width.
"""

from __future__ import annotations

import torch

from lavin_ds.config import NeckConfig, VisionConfig
from lavin_ds.models.necks import KINDS
from lavin_ds.models.trainable import Trainable


class Neck(Trainable):
    """Maps the vision tower's rows [N, F, W] to visual tokens [N, P, D]. N may be 0. Parameters are fp32."""

    def __init__(self, config: NeckConfig, vision: VisionConfig, width: int):
        """width: D, the LLM's width."""
        super().__init__()
        self.config = config

    def forward(self, x_NFW: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def build_neck(config: NeckConfig, vision: VisionConfig, width: int) -> Neck:
    """Builds a recipe's neck, for an LLM of `width` features."""
    return KINDS[config.kind].load()(config, vision, width)
