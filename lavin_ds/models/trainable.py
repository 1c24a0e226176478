"""Which parameters learn. A module that owns some derives from `Trainable`; all other parameters are frozen."""

from __future__ import annotations

import torch
from torch import nn


class Trainable(nn.Module):
    """A module whose own parameters learn.

    It holds them itself, not in nested Linear layers, so that ZeRO-3 gathers them all when its forward begins.
    """

    def reset(self, generator: torch.Generator) -> None:
        """Gives every parameter its first value, drawn from `generator` alone."""
        raise NotImplementedError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: those that a `Trainable` owns, and no other."""
    return {
        f"{owner}.{name}" if owner else name: parameter
        for owner, module in model.named_modules()
        if isinstance(module, Trainable)
        for name, parameter in module.named_parameters(recurse=False)
    }


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All the others, by name."""
    learning = trainable_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in learning}
