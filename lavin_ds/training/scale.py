"""The way back through an fp16 base: scaled up, so that small gradients do not vanish on it.

fp16 ends at 6e-8, and what a labelled token passes to an activation is often smaller. So the loss is multiplied by a
power of two, and each trainable parameter's gradient divided by it when it arrives, in fp32, before DeepSpeed sees it:
norm, clipping and update are those of the unscaled loss at every ZeRO stage. Micikevicius et al. 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

START = 2.0**16
PATIENCE = 1000  # steps without overflow after which the scale is doubled


class LossScale:
    """factor: by which the loss is to be multiplied; age: updates since it changed. Both are state of the run."""

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float = START, age: int = 0):
        self.factor, self.age = factor, age
        for parameter in parameters:
            parameter.register_hook(self._unscale)

    def _unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.factor

    def update(self, overflowed: bool) -> None:
        """After every step, on all ranks alike."""
        self.age = 0 if overflowed else self.age + 1
        if overflowed:
            self.factor = max(1.0, self.factor / 2)
        elif self.age == PATIENCE:
            self.factor, self.age = self.factor * 2, 0
