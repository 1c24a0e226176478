"""How DeepSpeed's ZeRO divides a model over the ranks, and the memory and traffic that it adds.

Stages 1 and 2 divide the moments and an fp32 copy of the trainable parameters. They hold a reduction buffer of
`reduce_bucket_size` elements, two with `overlap_comm`, from a micro-batch's first gradient to the end of its backward
pass, no matter how few gradients there are.

Stage 3 also divides every parameter and gathers it while it is in use. Its reduction buffer and this rank's share of
the gradients are held all the time. Gathered memory is not simulated but bounded from above: see
`ZeroPlan.gathered_bytes`. Linear layers become DeepSpeed's own, which keep their inputs for the backward pass even if
the weight is frozen.

The rules are those of DeepSpeed 0.19 (runtime/zero: stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py).
tests/profiling/test_zero.py and benchmarks/cost_model.py compare them with real steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.config import RunConfig
from lavin_ds.profiling.tracker import Operation, all_reduced
from lavin_ds.training.deepspeed_config import read_deepspeed_config

FP32 = 4  # bytes per trainable parameter and per gradient
GATHERING, REDUCING, UPDATING = "all_gather", "reduce gradients", "gather parameters"
ZERO_OPERATIONS = (GATHERING, REDUCING, UPDATING)


@dataclass(frozen=True)
class ZeroPlan:
    """How ZeRO divides a model over `ranks` data-parallel ranks. Sizes are in elements, as in DeepSpeed's JSON."""

    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False  # counted as if they stayed on the GPU
    buckets: int = 0  # reduction buffers
    bucket_size: int = 0
    prefetch_bucket: int = 0
    persistence_threshold: int = 0
    max_reuse_distance: int = 0
    max_live: int = 0

    @property
    def gathers(self) -> bool:
        """Whether a rank holds a part of every parameter and gathers the rest while it is in use."""
        return self.stage == 3 and self.ranks > 1

    @property
    def optimizer_share(self) -> float:
        """The share of the moments on this rank's GPU."""
        return 0.0 if self.offload_optimizer else 1.0 if self.stage == 0 else 1 / self.ranks

    def weight_share(self, elements: int) -> float:
        """The share of a parameter on this rank while it is not gathered. Stage 3 also keeps small ones whole."""
        if not self.gathers:
            return 1.0
        return 1 / self.ranks + (1.0 if elements <= self.persistence_threshold else 0.0)

    def bucket_bytes(self) -> int:
        return self.buckets * FP32 * self.bucket_size

    def standing_bytes(self, trainable: int, accumulates: bool) -> int:
        """Bytes held between steps, in addition to parameters and moments.

        accumulates: a step has several micro-batches.
        """
        part = FP32 * trainable // self.ranks
        if self.stage == 0:
            return FP32 * trainable if accumulates else 0
        if self.stage == 3:
            return part + self.bucket_bytes()
        return (0 if self.offload_optimizer else part) + (part if accumulates else 0)

    def gathered_bytes(self, model: nn.Module) -> tuple[int, int]:
        """Upper bounds of the bytes that stage 3 holds gathered at once: in whole parameters, and in its buffer.

        With prefetching, gathering runs ahead until `max_live` elements are whole. Without prefetching, a parameter
        stays whole only if its next use is within `max_reuse_distance` elements. In the forward pass, that holds for
        the last half of that distance, because the backward pass visits the modules in reverse. The largest module
        is added to both bounds. Parameters that are gathered together also share a buffer until the last of them is
        used. Without prefetching, a module's parameters may be gathered before the previous module's are released.
        """
        modules = [
            [p for p in module.parameters(recurse=False) if p.numel() > self.persistence_threshold]
            for module in model.modules()
        ]
        total = _bytes(p for own in modules for p in own)
        if not self.gathers or not total:
            return 0, 0
        mean = total / sum(p.numel() for own in modules for p in own)  # bytes per element
        largest = max(_bytes(own) for own in modules)
        if self.prefetch_bucket:
            whole, buffer = self.max_live * mean + largest, self.prefetch_bucket * mean + largest
        else:
            whole, buffer = self.max_reuse_distance / 2 * mean + largest, largest
        return int(min(total, whole)), int(min(total, buffer))

    def traffic(self, trainable: int, elements: int, bytes: int) -> list[Operation]:
        """What a rank sends in a step of one micro-batch.

        trainable: number of trainable parameters. elements, bytes: of all parameters on a rank, before ZeRO.

        The first half of an all-reduce sums the gradients, the second half distributes the result. From stage 2 on,
        the first half is sent in every micro-batch. Stage 3 gathers every parameter in the forward and again in the
        backward pass of every micro-batch, or only once if all parameters stay whole in between.
        """
        if self.ranks == 1:
            return []
        half = all_reduced(FP32 * trainable, self.ranks) // 2
        sent = [_sent(REDUCING, "backward" if self.stage >= 2 else "update", half)]
        if self.stage < 3:
            return [*sent, _sent(UPDATING, "update", half)]
        part = bytes * (self.ranks - 1) // self.ranks
        stays_whole = elements <= min(self.max_live, self.max_reuse_distance / 2)
        phases = ["forward"] if stays_whole else ["forward", "backward"]
        return [*(_sent(GATHERING, phase, part) for phase in phases), *sent]


def _bytes(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _sent(name: str, phase: str, bytes: int) -> Operation:
    return Operation(name, phase, 0, 0, exchanged=bytes)


def zero_plan(config: RunConfig, gpus: int) -> ZeroPlan:
    """The plan for the recipe's DeepSpeed configuration. Defaults are DeepSpeed's (runtime/zero/config.py)."""
    zero = read_deepspeed_config(config.deepspeed).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    ranks = gpus // config.tensor_parallel
    if stage == 0:
        return ZeroPlan(0, ranks)
    overlaps = zero.get("overlap_comm", stage == 3)
    return ZeroPlan(
        stage=stage,
        ranks=ranks,
        offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offload_parameters=_is_offloaded(zero, "offload_param"),
        buckets=2 if overlaps and stage < 3 else 1,
        bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
    )


def _is_offloaded(zero: dict, what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"


@contextmanager
def linear_layers_of(plan: ZeroPlan) -> Iterator[None]:
    """Replaces torch.nn.functional.linear as stage 3 does (zero.Init, mem_efficient_linear)."""
    if plan.stage != 3:
        yield
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints a warning to stdout
    from deepspeed.runtime.zero.linear import zero3_linear_wrap  # slow import; only stage 3 needs it

    plain = F.linear
    F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = plain
