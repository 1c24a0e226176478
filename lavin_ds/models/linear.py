"""Frozen linear layers: how a weight is stored, sliced over tensor-parallel ranks, filled and multiplied.

Dimensions: I input features, O output features. A weight is [O, I]. On a tensor-parallel rank, I or O is the rank's
share.

A `Storage` defines how a weight is stored in memory. A layer defines what is multiplied, and which part of the weight
this rank holds. A new way to store weights is a subclass of Storage and an entry in STORAGES.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import nn

from lavin_ds import parallel

Shape = tuple[int, ...]


class Storage:
    """How frozen weights are stored, and the dtype of their products. All layers share one instance.

    The stored tensors become parameters of their layer, because ZeRO-3 shards, gathers and counts only parameters.
    """

    def __init__(self, dtype: torch.dtype):
        """dtype: of the products, and of biases, norms and embeddings, which are never encoded."""
        self.dtype = dtype

    def empty(self, shape: Shape) -> dict[str, torch.Tensor]:
        """Uninitialised tensors for a weight of `shape`, by name."""
        raise NotImplementedError

    def encode(self, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes an fp32 weight; returns the stored tensors by name. A tensor-parallel rank encodes its own part."""
        raise NotImplementedError

    def decode(self, shape: Shape, **stored: torch.Tensor) -> torch.Tensor:
        """The weight [O, I] in `dtype`."""
        raise NotImplementedError

    def fill(self, shape: Shape, stored: dict[str, torch.Tensor], read: Callable[[torch.Tensor], None]) -> None:
        """Stores the weight that `read` copies into a tensor of `shape`. Needs one fp32 copy on the weight's device."""
        device = next(iter(stored.values())).device
        weight_OI = torch.empty(shape, dtype=torch.float32, device=device)
        read(weight_OI)
        for name, tensor in self.encode(weight_OI).items():
            stored[name].copy_(tensor)

    def multiply(self, x: torch.Tensor, shape: Shape, stored: dict[str, torch.Tensor], bias: torch.Tensor | None):
        """x W^T + b: [..., I] to [..., O]."""
        y = _DecodedLinear.apply(x, self, shape, tuple(stored), *stored.values())
        return y if bias is None else y + bias


class _DecodedLinear(torch.autograd.Function):
    """x W^T. The weight is decoded in forward and again in backward, and not kept in between."""

    @staticmethod
    def forward(ctx, x, storage, shape, names, *tensors):
        ctx.storage, ctx.shape, ctx.names = storage, shape, names
        ctx.save_for_backward(*tensors)
        return F.linear(x, storage.decode(shape, **dict(zip(names, tensors, strict=True))))

    @staticmethod
    def backward(ctx, gradient):
        weight_OI = ctx.storage.decode(ctx.shape, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        return gradient @ weight_OI, None, None, None, *(None for _ in ctx.names)


class Dense(Storage):
    """The plain weight, in the dtype of the product."""

    def empty(self, shape):
        return {"weight": torch.empty(shape, dtype=self.dtype)}

    def fill(self, shape, stored, read):
        read(stored["weight"])  # without an fp32 copy

    def multiply(self, x, shape, stored, bias):
        return F.linear(x, stored["weight"], bias)


# By the recipe's model.frozen_dtype.
STORAGES: dict[str, Storage] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "fp16": Dense(torch.float16),
}


class _StoredWeight(nn.Module):
    """Base of the frozen linear layers: a weight in some storage."""

    def _store(self, storage: Storage, shape: Shape) -> None:
        self.storage, self.shape = storage, shape
        stored = storage.empty(shape)
        self._stored_names = tuple(stored)
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def stored(self) -> dict[str, nn.Parameter]:
        """The tensors that store the weight, by name."""
        # Looked up at every use, because parameters may be replaced, for example by nn.Module.to.
        return {name: getattr(self, name) for name in self._stored_names}

    @torch.no_grad()
    def fill(self, read: Callable[[torch.Tensor], None]) -> None:
        """Stores the weight that `read` copies into a tensor of this rank's shape."""
        self.storage.fill(self.shape, self.stored(), read)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.storage.multiply(x, self.shape, self.stored(), self.bias)


class FrozenLinear(_StoredWeight):
    """y = x W^T + b, whole on every rank."""

    def __init__(self, inputs: int, outputs: int, storage: Storage):
        super().__init__()
        self._store(storage, (outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=storage.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x)


def leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """An `init_method` for fairscale that does nothing: drawing values that are then overwritten would take minutes."""
    return weight


class FrozenColumnLinear(_StoredWeight, ColumnParallelLinear):
    """y = x W^T, where a rank holds some rows of W. x is whole; y is the rank's part of the output features."""

    def __init__(self, inputs: int, outputs: int, storage: Storage):
        super().__init__(inputs, outputs, bias=False, gather_output=False, init_method=leave_uninitialised)
        del self.weight  # fairscale's, dense
        self._store(storage, (self.output_size_per_partition, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(copy_to_model_parallel_region(x))


class FrozenRowLinear(_StoredWeight, RowParallelLinear):
    """y = x W^T, where a rank holds some columns of W. x is the rank's part of the input features; y is whole."""

    def __init__(self, inputs: int, outputs: int, storage: Storage):
        super().__init__(inputs, outputs, bias=False, input_is_parallel=True, init_method=leave_uninitialised)
        del self.weight
        self._store(storage, (outputs, self.input_size_per_partition))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_model_parallel_region(self._multiply(x))


def held_part(owner: nn.Module, shape: Shape) -> tuple[slice, ...]:
    """The slices of a weight of `shape` that this tensor-parallel rank holds; `owner` is the layer."""
    part = [slice(0, size) for size in shape]
    dim = _split_dim(owner)
    if dim is not None:
        share = shape[dim] // parallel.tensor_parallel_size()
        part[dim] = slice(parallel.tensor_parallel_rank() * share, (parallel.tensor_parallel_rank() + 1) * share)
    return tuple(part)


def _split_dim(owner: nn.Module) -> int | None:
    if isinstance(owner, (ColumnParallelLinear, VocabParallelEmbedding)):
        return 0
    return 1 if isinstance(owner, RowParallelLinear) else None


@torch.no_grad()
def fill_weight(owner: nn.Module, name: str, read: Callable[[torch.Tensor], None]) -> None:
    """Fills the frozen parameter `name` of `owner`, in any storage, with what `read` copies into a tensor."""
    if name == "weight" and isinstance(owner, _StoredWeight):
        owner.fill(read)
    else:
        read(getattr(owner, name))
