"""Keeps the copies of trainable parameters equal on the ranks of a tensor-parallel group.

Every such rank holds all adapters and computes their gradients itself. On a GPU two ranks do not compute the same bits
(attention's backward adds in no fixed order), so without communication their copies would drift apart. Therefore each
gradient is averaged over the group as soon as it is computed, before DeepSpeed sees it. Norm, clipping, moments and the
decision to skip a step are then the same on all ranks of the group, at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from lavin_ds.parallel import TensorParallelUnit, tensor_parallel_size


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of `parameters` over the tensor-parallel group, in every backward pass from now on.

    It does one all-reduce per parameter. The ranks of a group do them in the same order, because they compute the same
    batch. The sum comes before the division, so 2 or 4 equal gradients keep their bits.
    """
    size = tensor_parallel_size()
    if size == 1:
        return
    group = TensorParallelUnit.get_model_parallel_group()

    def average(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.div_(size)

    for parameter in parameters:
        parameter.register_hook(average)
