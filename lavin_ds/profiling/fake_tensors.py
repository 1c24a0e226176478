"""The surroundings of a simulated step: fake tensors (shapes without memory) and a process group without peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.distributed.distributed_c10d import _world
from torch.testing._internal.distributed.fake_pg import _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from lavin_ds.models.meta import tensors_in
from lavin_ds.parallel import initialize_single_process


class ConcreteIndices(TorchDispatchMode):
    """Inside FakeTensorMode, runs operators on integers and booleans with real values.

    Fake tensors have no values, so a boolean mask would select an unknown number of rows. Ids, labels, masks and
    counters are small, so they stay real. A fake step then takes the branches and has the shapes of a real one.

    Devices, in-place updates and views need no kernel. They are answered here: in FakeTensorMode they would take most
    of a simulation's time.
    """

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:
                return args[0].fake_device
            if _updates_its_first(func):
                return args[0]
            if _is_view(func):
                with in_kernel_invocation_manager(self.mode):
                    view = func(*args, **kwargs)
                return FakeTensor(self.mode, view, args[0].fake_device)
        tensors = tensors_in((args, *kwargs.values()))
        is_fake = any(isinstance(x, FakeTensor) for x in tensors)
        makes_floats = not tensors and not _is_integral_factory(func, kwargs)
        if not is_fake and not makes_floats:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*_without_masks(args), **kwargs)


@cache
def _updates_its_first(func) -> bool:
    """Whether an operator writes to its first argument and returns it, in the same shape."""
    schema = func._schema
    if len(schema.returns) != 1 or torch.Tag.inplace_view in func.tags or func is torch.ops.aten.resize_.default:
        return False
    written, returned = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return bool(written and written.is_write and returned and returned.is_write)


@cache
def _is_view(func) -> bool:
    returns = func._schema.returns
    return func.is_view and len(returns) == 1 and str(returns[0].type) == "Tensor"


def _is_integral_factory(func, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:  # only arange infers an integer dtype from its arguments
        return func._overloadpacket is torch.ops.aten.arange
    return not (dtype.is_floating_point or dtype.is_complex)


def _without_masks(args: tuple) -> tuple:
    """Replaces each boolean mask in a list of indices by the positions it selects."""

    def replace(indices: list) -> list:
        positions = []
        for index in indices:
            is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
            positions += _positions(index) if is_mask else [index]
        return positions

    return tuple(replace(arg) if isinstance(arg, (list, tuple)) else arg for arg in args)


def _positions(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with unset_fake_temporarily():
        return mask.nonzero(as_tuple=True)


@contextmanager
def first_rank_of(tensor_parallel: int) -> Iterator[None]:
    """Makes this process rank 0 of a tensor-parallel group of that size. Its collectives return at once."""
    initialize_single_process()
    if tensor_parallel == 1:
        yield
        return
    group = dist.ProcessGroup(dist.HashStore(), 0, tensor_parallel)
    backend = _create_fake_pg(SimpleNamespace(group_rank=0, group_size=tensor_parallel), None)
    group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
    previous, groups._MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP, group
    _world.pg_group_ranks[group] = {rank: rank for rank in range(tensor_parallel)}  # torch looks up rank numbers here
    try:
        yield
    finally:
        groups._MODEL_PARALLEL_GROUP = previous
        del _world.pg_group_ranks[group]


def make_fake(model: nn.Module) -> None:
    """Replaces meta parameters by fake ones. Call it inside FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
