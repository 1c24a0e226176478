"""Tracks what a step allocates and computes, operator by operator, on real or fake tensors.

A weak reference tracks every storage from the operator that makes it until nothing refers to it, autograd included.
This is what a caching allocator sees. Memory that a kernel allocates and frees internally is not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lavin_ds.models.meta import tensors_in

ALIVE = -1  # the `died` of a storage that still exists


@dataclass(slots=True)
class Life:
    """One storage. `born` and `died` are times: the number of allocations and releases before."""

    bytes: int
    born: int
    phase: str  # in which it was allocated
    operator: str  # that allocated it
    shape: tuple[int, ...]  # of the first tensor seen that uses it
    label: str | None = None
    died: int = ALIVE


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator call: FLOPs, bytes read and written, and bytes that a rank sends if it is a collective."""

    name: str
    phase: str
    flops: int
    bytes: int
    dtype: str = "float32"  # of its result
    exchanged: int = 0


class Tracker(TorchDispatchMode):
    """Records storages and operations while it is active (`with tracker:`)."""

    def __init__(self, tensor_parallel: int = 1):
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.phase = "setup"
        self.lives: list[Life] = []
        self.operations: list[Operation] = []
        self.phase_ends: dict[str, int] = {}
        self._clock = 0
        self._alive: dict[int, Life] = {}  # by the address of the storage

    def tick(self) -> int:
        """A time for an event that is not an allocation."""
        self._clock += 1
        return self._clock - 1

    def enter_phase(self, name: str) -> None:
        self.phase_ends[self.phase] = self._clock
        self.phase = name

    def label(self, tensors, label: str) -> None:
        """Labels the storages of `tensors`, which may have been allocated before the tracker was active."""
        for tensor in tensors:
            self._see(tensor).label = label

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, *kwargs.values())), tensors_in((result,))
        known = {_address(x) for x in inputs}
        is_view = not func._schema.is_mutable and all(_address(x) in known for x in outputs)
        name = func._overloadpacket.__name__
        for tensor in outputs:
            self._see(tensor, name)
        if func.namespace == "c10d":
            size = sum(x.numel() * x.element_size() for x in outputs)
            self.operations.append(Operation(name, self.phase, 0, 0, exchanged=all_reduced(size, self.tensor_parallel)))
        elif not is_view:
            has_rows = any(x.numel() for x in outputs)  # a matrix product with no rows does not read the weight
            moved = sum(x.numel() * x.element_size() for x in (*inputs, *outputs)) if has_rows else 0
            dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else "float32"
            self.operations.append(Operation(name, self.phase, _flops(func, args, kwargs, result), moved, dtype))
        return result

    def _see(self, tensor: torch.Tensor, operator: str = "") -> Life:
        storage = tensor.untyped_storage()
        address = storage._cdata
        life = self._alive.get(address)
        if life is None:
            life = Life(storage.nbytes(), self._clock, self.phase, operator, tuple(tensor.shape))
            self._clock += 1
            self._alive[address] = life
            self.lives.append(life)
            weakref.finalize(storage, self._release, address).atexit = False
        return life

    def _release(self, address: int) -> None:
        self._alive.pop(address).died = self._clock
        self._clock += 1


def all_reduced(bytes: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends to all-reduce a tensor of that many bytes in a ring."""
    return bytes * 2 * (ranks - 1) // ranks


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops(func, args, kwargs, result) -> int:
    """FLOPs by the formulas of torch's FlopCounterMode. A multiply-add counts as two."""
    formula = ATTENTION_ON_CPU.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _cpu_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's registry has only the attention kernels of GPUs, but fake tensors run as CPU tensors.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
