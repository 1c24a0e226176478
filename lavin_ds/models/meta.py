"""Builds a recipe's model on torch's meta device, where parameters take no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lavin_ds.config import RunConfig
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process


class OnMeta(TorchDispatchMode):
    """Creates every tensor on the meta device, with shape and dtype but without values.

    `with torch.device("meta")` is not enough: fairscale's layers call `torch.Tensor(out, in)`, which ignores it.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not tensors_in((args, *kwargs.values())) and any(
            argument.name == "device" for argument in func._schema.arguments
        ):
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def tensors_in(values: Iterable) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results, also those inside lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def build_on_meta(config: RunConfig, make: Callable[..., Lavin] = Lavin) -> Lavin:
    """Builds a recipe's model as training does, with parameters that take no memory. Takes 0.3 s at 13B.

    make: the class to build, called with the arguments of Lavin.
    """
    initialize_single_process()
    with OnMeta():
        return make(
            config.model,
            compat=config.compat is not None,
            activation_checkpointing=config.training.activation_checkpointing,
        )


def allocate(model: nn.Module, names: Iterable[str], device: torch.device | str) -> None:
    """Replaces these parameters by uninitialised ones on `device`."""
    for name in list(names):
        owner, _, own = name.rpartition(".")
        on_meta = model.get_parameter(name)
        parameter = nn.Parameter(torch.empty_like(on_meta, device=device), requires_grad=on_meta.requires_grad)
        setattr(model.get_submodule(owner), own, parameter)
