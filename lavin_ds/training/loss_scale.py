"""Loss scaling for an fp16 base (Micikevicius et al. 2018, section 3.2).

The smallest fp16 number is 6e-8, and gradients of activations are often smaller. So the loss is multiplied by a power
of two. The trainable parameters are fp32; their gradients are divided by the same factor before DeepSpeed sees them.
Norm, clipping and update are then those of the unscaled loss, at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 1000  # the scale is doubled after this many steps without overflow


class LossScale:
    """factor: the caller multiplies the loss by it. age: updates since it last changed. A checkpoint stores both."""

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float = INITIAL_SCALE, age: int = 0):
        self.factor, self.age = factor, age
        for parameter in parameters:
            parameter.register_hook(self._unscale)

    def _unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.factor

    def update(self, overflowed: bool) -> None:
        """Adjusts the factor. Call it after every step, with the same value on all ranks."""
        self.age = 0 if overflowed else self.age + 1
        if overflowed:
            self.factor = max(1.0, self.factor / 2)
        elif self.age == GROWTH_INTERVAL:
            self.factor, self.age = self.factor * 2, 0
