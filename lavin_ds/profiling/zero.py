"""What DeepSpeed's ZeRO takes from a rank and adds to it.

From reading deepspeed 0.19.8; benchmarks/cost_model.py compares it with real steps.

Stages 1 and 2 (runtime/zero/stage_1_and_2.py): the moments and an fp32 copy of the trainable parameters are divided
over the ranks. From a micro-batch's first gradient to the end of its backward pass there is a reduction buffer of
`reduce_bucket_size` elements (setup_buckets), two with overlap_comm, however few gradients there are.

Stage 3 (stage3.py, partition_parameters.py, partitioned_param_coordinator.py): every parameter is divided too, and
gathered while it is in use. The reduction buffer and the rank's gradients are there all the time. Linear layers are
DeepSpeed's own, which keep their inputs for backward even where the weight is frozen.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from lavin_ds.config import RunConfig
from lavin_ds.profiling.tracker import Life, Tracker
from lavin_ds.training.deepspeed_config import read_deepspeed_config

GATHERING = "all_gather"  # of ZeRO-3, in lives and operations
FP32 = 4  # bytes; the trainable parameters and their gradients


@dataclass(frozen=True)
class ZeroPlan:
    """How ZeRO divides a rank's model over `ranks` data-parallel ranks. Sizes in elements, as in DeepSpeed's JSON."""

    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False  # counted as if they stayed on the GPU
    buckets: int = 0  # of reduction
    bucket_size: int = 0
    prefetch_bucket: int = 0
    persistence_threshold: int = 0
    max_reuse_distance: int = 0
    max_live: int = 0

    @property
    def gathers(self) -> bool:
        """A rank holds a part of every parameter, and gathers the whole while it is in use."""
        return self.stage == 3 and self.ranks > 1

    @property
    def optimizer_share(self) -> float:
        """Of the moments, on this rank's GPU."""
        return 0.0 if self.offload_optimizer else 1.0 if self.stage == 0 else 1 / self.ranks

    @property
    def weight_share(self) -> float:
        """Of every parameter that is not in use."""
        return 1 / self.ranks if self.gathers else 1.0

    def bucket_bytes(self) -> int:
        return self.buckets * FP32 * self.bucket_size

    def standing_bytes(self, trainable: int, accumulates: bool) -> int:
        """Held from one step to the next, beside parameters and moments. `accumulates` over micro-batches."""
        part = FP32 * trainable // self.ranks
        if self.stage == 0:
            return FP32 * trainable if accumulates else 0
        if self.stage == 3:
            return part + self.bucket_bytes()
        return (0 if self.offload_optimizer else part) + (part if accumulates else 0)


def zero_plan(config: RunConfig, gpus: int) -> ZeroPlan:
    """Of the recipe's DeepSpeed configuration on `gpus` GPUs. Defaults are DeepSpeed's (runtime/zero/config.py)."""
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
    """torch.nn.functional.linear as stage 3 replaces it (zero.Init, mem_efficient_linear)."""
    if plan.stage != 3:
        yield
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, on stdout, that it found no other
    from deepspeed.runtime.zero.linear import zero3_linear_wrap  # takes seconds, and stage 3 alone needs it

    plain = F.linear
    F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = plain


@dataclass
class ModuleTrace:
    """When modules begin and end, in forward, recomputation and backward, and the parameters that are their own."""

    moments: list[tuple[int, bool, tuple[nn.Parameter, ...]]] = field(default_factory=list)  # clock, begins, parameters

    @contextmanager
    def of(self, model: nn.Module, tracker: Tracker) -> Iterator[None]:
        hooks = []
        for module in model.modules():  # those without parameters too: when they begin, others' are prefetched
            own = tuple(module.parameters(recurse=False))
            hooks += [
                module.register_forward_pre_hook(lambda *_, own=own: self._note(tracker, True, own)),
                module.register_forward_hook(lambda *_, own=own: self._note(tracker, False, own)),
                module.register_full_backward_pre_hook(lambda *_, own=own: self._note(tracker, True, own)),
                module.register_full_backward_hook(lambda *_, own=own: self._note(tracker, False, own)),
            ]
        yield
        for hook in hooks:
            hook.remove()

    def _note(self, tracker: Tracker, begins: bool, own: tuple[nn.Parameter, ...]) -> None:
        self.moments.append((tracker.tick(), begins, own))


@dataclass
class _Gathering:
    """One collective: its buffer, what comes in it, and which of that no module has begun with yet."""

    buffer: Life
    parameters: list[nn.Parameter]
    awaited: set[nn.Parameter]


def gathered_lives(plan: ZeroPlan, trace: ModuleTrace, end_of_backward: int) -> list[Life]:
    """Whole parameters and gathering buffers of ZeRO-3 over a step, by the rules of its parameter coordinator.

    A module's parameters are gathered when it begins, then as many of those that follow as fill the prefetch bucket.
    What comes in one buffer is copied out of it when the first of them is needed; the buffer goes when a module of the
    last of them begins (InflightParamRegistry maps each to the handle that holds it).
    When a module ends, its parameters are released unless they are used again within the reuse distance.
    """
    uses = [own for _, begins, own in trace.moments if begins]
    queue = deque((step, p) for step, own in enumerate(uses) for p in own)
    lives: list[Life] = []
    whole: dict[nn.Parameter, Life] = {}
    in_flight: dict[nn.Parameter, _Gathering] = {}
    fetched_for: dict[nn.Parameter, int] = {}
    live_elements = 0
    step = 0

    def persists(parameter: nn.Parameter) -> bool:
        return parameter.numel() <= plan.persistence_threshold

    def grow(born: int, parameters: list[nn.Parameter], operator: str) -> Life:
        size = sum(p.numel() * p.element_size() for p in parameters)
        life = Life(size, born, "", operator, (sum(p.numel() for p in parameters),), "gathered", end_of_backward)
        lives.append(life)
        return life

    def gather(clock: int, parameters: list[nn.Parameter]) -> None:
        nonlocal live_elements
        buffer = grow(clock, parameters, GATHERING)
        live_elements += sum(p.numel() for p in parameters)
        gathering = _Gathering(buffer, parameters, set(parameters))
        in_flight.update(dict.fromkeys(parameters, gathering))

    def wait(clock: int, parameter: nn.Parameter) -> None:
        gathering = in_flight.pop(parameter)
        alone = len(gathering.parameters) == 1
        if len(gathering.awaited) == len(gathering.parameters):
            for p in gathering.parameters:
                whole[p] = gathering.buffer if alone else grow(clock, [p], "gathered parameter")
        gathering.awaited.remove(parameter)
        if not gathering.awaited and not alone:
            gathering.buffer.died = clock

    for clock, begins, own in trace.moments:
        if begins:
            missing = [p for p in own if p not in whole and p not in in_flight and not persists(p)]
            if missing:
                gather(clock, missing)
            for p in own:
                if p in in_flight:
                    wait(clock, p)
            while queue and queue[0][0] <= step:
                at, p = queue.popleft()
                fetched_for[p] = max(fetched_for.get(p, -1), at)
            room, ahead = min(plan.max_live - live_elements, plan.prefetch_bucket), {}
            while queue and sum(p.numel() for p in ahead) < room:
                at, p = queue.popleft()
                fetched_for[p] = max(fetched_for.get(p, -1), at)
                if p not in whole and p not in in_flight and p not in ahead and not persists(p):
                    ahead[p] = True
            if ahead:
                gather(clock, list(ahead))
            step += 1
            continue
        needed_soon, traversed = set(), 0
        for following in uses[step:]:
            if traversed >= plan.max_reuse_distance:
                break
            needed_soon.update(following)
            traversed += sum(p.numel() for p in following)
        for p in own:
            if p in whole and p not in needed_soon and fetched_for.get(p, -1) <= step:
                whole.pop(p).died = clock
                live_elements -= p.numel()
    return lives
