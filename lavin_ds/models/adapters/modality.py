"""The modality embedding. Its rows are the routing tokens of the LLM's routed adapters."""

from __future__ import annotations

import torch
from torch import nn

from lavin_ds.models.trainable import Trainable


class ModalityEmbedding(Trainable):
    """E_m: row 0 is for text-only samples, row 1 for samples with an image (paper 1, eq. 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))

    def reset(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, generator=generator)

    def forward(self) -> torch.Tensor:
        return self.weight
