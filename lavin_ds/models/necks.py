"""Necks: from the rows that a vision tower hands out to visual tokens in the LLM's width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.models.trainable import Trainable


class VisualNeck(Trainable):
    """Visual tokens in the LLM's width: W_u silu(W_d x + b_d) + b_u (paper 1, eq. 6).

    The paper says SwiGLU; the published parameter count and code are those of a plain SiLU (reference.md,
    section 9).
    """

    def __init__(self, vision_width: int, hidden: int, width: int):
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(hidden, vision_width))
        self.down_bias = nn.Parameter(torch.empty(hidden))
        self.up_weight = nn.Parameter(torch.empty(width, hidden))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        for weight in (self.down_weight, self.up_weight):
            nn.init.xavier_uniform_(weight, generator=generator)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., vision width] -> [..., D], computed in fp32: there are P rows an image."""
        hidden = F.silu(F.linear(x.float(), self.down_weight, self.down_bias))
        return F.linear(hidden, self.up_weight, self.up_bias)
