"""Which parameters are trained: those of modules that derive from `Trainable`. All other parameters are frozen."""

from __future__ import annotations

import torch
from torch import nn


class Trainable(nn.Module):
    """A module whose own parameters are trained.

    It holds them directly, not in nested Linear layers, so that ZeRO-3 gathers all of them when its forward begins.
    """

    def reset(self, generator: torch.Generator) -> None:
        """Initialises every parameter. Random values come only from `generator`."""
        raise NotImplementedError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by name: those that a `Trainable` owns directly."""
    return {
        f"{owner}.{name}" if owner else name: parameter
        for owner, module in model.named_modules()
        if isinstance(module, Trainable)
        for name, parameter in module.named_parameters(recurse=False)
    }


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All other parameters, by name."""
    learning = trainable_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in learning}
