"""Necks that map each row to one visual token.

Dimensions: N images, F rows per image from the vision tower, W vision width, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.config import NeckConfig, VisionConfig
from lavin_ds.models.necks.base import Neck


class LavinNeck(Neck):
    """W_u silu(W_d x + b_d) + b_u, through `dim` features (paper 1, eq. 6).

    The paper says SwiGLU, but the published parameter count and code are those of a plain SiLU (reference.md,
    section 9).
    """

    def __init__(self, config: NeckConfig, vision: VisionConfig, width: int):
        super().__init__(config, vision, width)
        self.down_weight = nn.Parameter(torch.empty(config.dim, vision.width))
        self.down_bias = nn.Parameter(torch.empty(config.dim))
        self.up_weight = nn.Parameter(torch.empty(width, config.dim))
        self.up_bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        for weight in (self.down_weight, self.up_weight):
            nn.init.xavier_uniform_(weight, generator=generator)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, x_NFW: torch.Tensor) -> torch.Tensor:
        """[N, F, W] -> [N, F, D], computed in fp32: with LaVIN's 6 rows per image this costs little."""
        hidden = F.silu(F.linear(x_NFW.float(), self.down_weight, self.down_bias))
        return F.linear(hidden, self.up_weight, self.up_bias)


class LinearNeck(Neck):
    """W x + b (LLaVA, eq. 1)."""

    def __init__(self, config: NeckConfig, vision: VisionConfig, width: int):
        super().__init__(config, vision, width)
        self.weight = nn.Parameter(torch.empty(width, vision.width))
        self.bias = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.xavier_uniform_(self.weight, generator=generator)
        nn.init.zeros_(self.bias)

    def forward(self, x_NFW: torch.Tensor) -> torch.Tensor:
        """[N, F, W] -> [N, F, D], computed in the rows' dtype."""
        return F.linear(x_NFW, self.weight.to(x_NFW.dtype), self.bias.to(x_NFW.dtype))
