"""Loss scaling for an fp16 base (Micikevicius et al. 2018, section 3.2).

The smallest number of fp16 is 6e-8, and gradients of activations are often smaller. So the loss is multiplied by a
power of two, and the gradient of each trainable parameter, which is fp32, is divided by it before DeepSpeed sees it.
Norm, clipping and update are then those of the unscaled loss, at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

START = 2.0**16
PATIENCE = 1000  # steps without overflow after which the scale is doubled


class LossScale:
    """factor: the loss must be multiplied by it. age: updates since it changed. Both are part of a checkpoint."""

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float = START, age: int = 0):
        self.factor, self.age = factor, age
        for parameter in parameters:
            parameter.register_hook(self._unscale)

    def _unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.factor

    def update(self, overflowed: bool) -> None:
        """Must be called after every step, with the same value on all ranks."""
        self.age = 0 if overflowed else self.age + 1
        if overflowed:
            self.factor = max(1.0, self.factor / 2)
        elif self.age == PATIENCE:
            self.factor, self.age = self.factor * 2, 0
