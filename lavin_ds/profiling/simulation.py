"""Simulates one training step at full size, without its memory and without a GPU.

The simulation runs one optimizer step of the real model (forward, backward, AdamW) on fake tensors and tracks every
storage (tracker.py). It counts tensors. It does not count the CUDA context (about 0.5 GB), cuBLAS workspaces or the
allocator's fragmentation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lavin_ds.config import RunConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.sampler import micro_batches
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.meta import build_on_meta
from lavin_ds.parallel import check_world, tensor_parallel_size
from lavin_ds.profiling.fake_tensors import ConcreteIndices, first_rank_of, make_fake
from lavin_ds.profiling.tracker import ALIVE, Life, Operation, Tracker
from lavin_ds.profiling.workload import Workload, make_batch
from lavin_ds.profiling.zero import GATHERING, ZeroPlan, linear_layers_of, zero_plan

NO_ZERO = ZeroPlan()
FP32 = 4  # bytes

PHASES = ("forward", "backward", "update", "end")

COMPONENTS = {
    "frozen": "frozen weights: LLaMA and ViT",
    "adapters": "trainable parameters: adapters, neck, modality embedding",
    "gradients": "gradients of the trainable parameters",
    "optimizer": "AdamW's two moments per trainable parameter",
    "zero": "ZeRO's buffers, by DeepSpeed's formulas",
    "gathered": "parameters that ZeRO-3 has gathered, and its buffers",
    "batch": "token ids, labels and images of the micro-batch",
    "activations": "kept from forward for backward",
    "logits": "tensors with one column per vocabulary entry: logits, their gradients",
    "temporaries": "the rest: gradients of activations, recomputed activations, scratch",
}


@dataclass(frozen=True)
class Simulation:
    """The memory and the operations of one optimizer step on one rank.

    phases: the peak of each phase (forward, backward, update), in bytes by component (the keys of COMPONENTS).
    moments: the operator at each of those peaks.
    """

    workload: Workload
    phases: dict[str, dict[str, int]]
    moments: dict[str, str]
    operations: list[Operation]
    # After every allocation: bytes by component (columns in the order of COMPONENTS), and the index of the phase.
    timeline: np.ndarray = field(repr=False, compare=False)
    timeline_phases: np.ndarray = field(repr=False, compare=False)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component at the step's peak."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def moment(self) -> str:
        return f"{self.peak_phase}, {self.moments[self.peak_phase]}"

    def flops(self, phase: str | None = None) -> int:
        return sum(o.flops for o in self.operations if phase in (None, o.phase))

    def as_dict(self) -> dict:
        return {
            "workload": asdict(self.workload),
            "peak_bytes": self.peak_bytes,
            "moment": self.moment,
            "components": self.components,
            "phases": self.phases,
            "flops": {phase: self.flops(phase) for phase in self.phases},
        }


def simulate(config: RunConfig, workload: Workload, gpus: int = 1, make: Callable[..., Lavin] = Lavin) -> Simulation:
    """One optimizer step of `config` on one of `gpus` ranks. Takes 20 s at 13B.

    A tensor-parallel rank holds and computes its slices. ZeRO divides the moments (stage 3 also the parameters) over
    gpus / tensor_parallel data-parallel ranks. `make` builds the model: see build_on_meta.

    Raises:
        UserError: tensor_parallel does not divide `gpus`, or a sample is too short for its visual tokens.
    """
    check_world(gpus, config.tensor_parallel)
    plan = zero_plan(config, gpus)
    with first_rank_of(config.tensor_parallel):
        model = build_on_meta(config, make)
        batch = make_batch(config.model, workload, config.training.packing)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            make_fake(model)
            with ConcreteIndices(mode):
                for name in ("images_NHWC", "features_NFW"):
                    if getattr(batch, name) is not None:
                        batch = replace(batch, **{name: mode.from_tensor(getattr(batch, name))})
                tracker = trace_step(model, batch, plan)
    ranks = gpus // config.tensor_parallel
    accumulates = micro_batches(config.training.global_batch, ranks, config.training.micro_batch) > 1
    return summarise(tracker, workload, plan, accumulates)


def trace_step(model: Lavin, batch: Batch, plan: ZeroPlan = NO_ZERO) -> Tracker:
    """Runs and tracks one optimizer step as the training loop does, on real or fake tensors."""
    trainable = list(model.trainable().values())
    optimizer = torch.optim.AdamW(trainable)
    # AdamW allocates the moments in its first step. That step is made here, so the tracked one is a later step.
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tracker = Tracker(tensor_parallel_size())
    tracker.label((p for p in model.parameters() if not p.requires_grad), "frozen")
    tracker.label(trainable, "adapters")
    tracker.label((x for state in optimizer.state.values() for x in state.values()), "optimizer")
    tracker.label((x for x in vars(batch).values() if isinstance(x, torch.Tensor)), "batch")
    model.train()
    with linear_layers_of(plan), tracker:
        tracker.enter_phase("forward")
        began = tracker.tick()
        loss_sum, labels = model(batch)
        loss = loss_sum / max(labels, 1)
        tracker.enter_phase("backward")
        loss.backward()
        tracker.enter_phase("update")
        tracker.label((p.grad for p in trainable if p.grad is not None), "gradients")
        optimizer.step()
        tracker.enter_phase("end")
    elements = sum(p.numel() for p in model.parameters())
    bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    tracker.operations += plan.traffic(sum(p.numel() for p in trainable), elements, bytes)
    _label_the_rest(tracker, vocabulary=model.llm.output.weight.shape[0])
    tracker.lives += _gathered(tracker, model, plan, began)
    return tracker


def _gathered(tracker: Tracker, model: Lavin, plan: ZeroPlan, began: int) -> list[Life]:
    """The parameters that ZeRO-3 gathers, at their upper bound throughout forward and backward.

    If the prefetch bucket has room for the whole model, there is one buffer, and it is freed when the output layer
    begins.
    """
    whole, buffer = plan.gathered_bytes(model)
    end = buffer_end = tracker.phase_ends["backward"]
    if plan.prefetch_bucket and buffer == whole:
        buffer_end = min((life.born for life in tracker.lives if life.label == "logits"), default=end)
    pairs = [(whole, end), (buffer, buffer_end)]
    return [Life(size, began, "forward", GATHERING, (size,), "gathered", until) for size, until in pairs if size]


def _label_the_rest(tracker: Tracker, vocabulary: int) -> None:
    end_of_forward = tracker.phase_ends["forward"]
    for life in tracker.lives:
        if life.label is None:
            kept = life.born < end_of_forward and (life.died == ALIVE or life.died >= end_of_forward)
            if life.shape and life.shape[-1] == vocabulary:
                life.label = "logits"
            else:
                life.label = "activations" if kept else "temporaries"


def summarise(tracker: Tracker, workload: Workload, plan: ZeroPlan = NO_ZERO, accumulates: bool = False) -> Simulation:
    """Finds the peak of each phase of a tracked step.

    accumulates: the step has several micro-batches, so the gradients of earlier ones are also held.
    """
    trainable = sum(life.bytes for life in tracker.lives if life.label == "adapters") // FP32
    held, peaks, moments = Counter(zero=plan.standing_bytes(trainable, accumulates)), {}, {}
    lives = [*tracker.lives, *_reduction_buckets(tracker, plan)]
    timeline, timeline_phases = [], []
    for life, grows in _in_order(lives):
        bytes = int(life.bytes * _share(life, plan))
        held[life.label] += bytes if grows else -bytes
        if grows and life.phase != "setup":
            timeline.append([held[name] for name in COMPONENTS])
            timeline_phases.append(PHASES.index(life.phase))
            highest = peaks.get(life.phase)
            if highest is None or held.total() > highest.total():
                peaks[life.phase] = held.copy()
                moments[life.phase] = f"at {life.operator} {list(life.shape)}"
    phases = {phase: {name: peak[name] for name in COMPONENTS} for phase, peak in peaks.items()}
    return Simulation(workload, phases, moments, tracker.operations, np.array(timeline), np.array(timeline_phases))


def _share(life: Life, plan: ZeroPlan) -> float:
    if life.label == "optimizer":
        return plan.optimizer_share
    return plan.weight_share(math.prod(life.shape)) if life.label in ("frozen", "adapters") else 1.0


def _reduction_buckets(tracker: Tracker, plan: ZeroPlan) -> list[Life]:
    """The reduction buckets of stages 1 and 2, which exist from the first gradient to the end of the backward pass."""
    born = [life.born for life in tracker.lives if life.label == "gradients"]
    if not born or plan.stage not in (1, 2):
        return []
    size = plan.buckets * plan.bucket_size
    return [
        Life(plan.bucket_bytes(), min(born), "backward", "reduction", (size,), "zero", tracker.phase_ends["backward"])
    ]


def _in_order(lives: Iterable[Life]) -> Iterable[tuple[Life, bool]]:
    """Allocations (True) and releases (False), in the order they happened."""
    moments = [(life.born, life, True) for life in lives]
    moments += [(life.died, life, False) for life in lives if life.died != ALIVE]
    return [(life, grows) for _, life, grows in sorted(moments, key=lambda m: (m[0], not m[2]))]
