"""Memory of a training step: simulated at full size without a GPU, and as a finished run recorded it.

The simulation runs one real optimizer step of the real model (forward, backward, AdamW) on fake tensors and
follows every storage (tracker.py). It counts tensors. It does not count the CUDA context (about 0.5 GB),
cuBLAS workspaces or what the allocator loses to fragmentation.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lavin_ds.config import ModelConfig, RunConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.layout import IGNORE
from lavin_ds.data.sampler import micro_batches
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.meta import build_on_meta
from lavin_ds.parallel import check_world, tensor_parallel_size
from lavin_ds.profiling.skeleton import ConcreteIndices, first_rank_of, make_fake
from lavin_ds.profiling.tracker import ALIVE, Life, Operation, Tracker, all_reduced
from lavin_ds.profiling.zero import GATHERING, ModuleTrace, ZeroPlan, gathered_lives, linear_layers_of, zero_plan
from lavin_ds.run import adapter_file

NO_ZERO = ZeroPlan()
FP32 = 4  # bytes
VISUAL_START = 4  # behind BOS and "Image: ", 3 pieces in LLaMA's tokenizer; costs nothing either way

REDUCING, UPDATING = "reduce gradients", "gather parameters"
ZERO_OPERATIONS = (GATHERING, REDUCING, UPDATING)  # of data-parallel ranks

PHASES = ("forward", "backward", "update", "end")

COMPONENTS = {
    "frozen": "frozen weights: LLaMA and ViT",
    "adapters": "trainable parameters: adapters, neck, modality embedding",
    "gradients": "gradients of the trainable parameters",
    "optimizer": "AdamW's two moments",
    "zero": "DeepSpeed's ZeRO buffers, by its formulas",
    "gathered": "ZeRO-3's whole parameters and gathering buffers",
    "batch": "token ids, labels and images of the micro-batch",
    "activations": "kept from forward for backward",
    "logits": "rows over the vocabulary, and what the loss makes of them",
    "temporaries": "everything else: gradients of activations, recomputed activations, scratch",
}


@dataclass(frozen=True)
class Workload:
    """One micro-batch. `length` counts positions of a sample with the modality token, all samples alike."""

    samples: int
    length: int
    image_fraction: float = 1.0  # of the samples
    labelled_fraction: float = 1.0  # of the positions, at the end of each sample

    def __post_init__(self):
        if self.samples < 1 or self.length < 2:
            raise UserError(f"A micro-batch needs a sample of 2 positions: got {self.samples} of {self.length}.")
        for name in ("image_fraction", "labelled_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1.")

    @property
    def images(self) -> int:
        return round(self.samples * self.image_fraction)


@dataclass(frozen=True)
class Simulation:
    """What one optimizer step of one rank holds and computes.

    `phases` holds each phase's peak by component, bytes, keys of COMPONENTS: the phases are forward, backward
    and update. `moments` says by which operator each of those peaks was reached.
    """

    workload: Workload
    phases: dict[str, dict[str, int]]
    moments: dict[str, str]
    operations: list[Operation]
    # Bytes by component (columns in the order of COMPONENTS) behind every allocation, and its phase's number.
    timeline: np.ndarray = field(repr=False, compare=False)
    timeline_phases: np.ndarray = field(repr=False, compare=False)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def components(self) -> dict[str, int]:
        """What the peak is made of."""
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


def worst_case(config: RunConfig, gpus: int | None = None, length: int | None = None) -> Workload:
    """The micro-batch that sets the peak: full length, an image in every sample, a label in every position.

    So many samples as the ranks' micro-batches get when they share a global batch of samples of that length: more
    than `micro_batch` never, fewer where there are many ranks. gpus: by default those of one model.
    """
    training = config.training
    ranks = (gpus or config.tensor_parallel) // config.tensor_parallel
    shares = ranks * micro_batches(training.global_batch, ranks, training.micro_batch)
    return Workload(
        samples=math.ceil(training.global_batch / shares),
        length=length or config.data.max_length,
        image_fraction=1.0 if config.model.vision else 0.0,
    )


def make_batch(model: ModelConfig, workload: Workload, packing: bool = False) -> Batch:
    """A micro-batch of that shape, of zeros, one row a sample or packed in one. Images come first."""
    B, T = workload.samples, workload.length - 1  # the model itself puts the modality token before the ids
    labelled = min(T, round(workload.length * workload.labelled_fraction))
    images = workload.images if model.vision else 0
    needed = VISUAL_START + model.visual_tokens
    if images and workload.length <= needed:
        raise UserError(f"length {workload.length} has no room for {model.visual_tokens} visual tokens.")
    labels_BT = torch.full((B, T), IGNORE)
    labels_BT[:, T - labelled :] = 0
    size = model.vision.image_size if images else 0
    rows = (1, -1) if packing else (B, T)
    return Batch(
        ids_BT=torch.zeros(B, T, dtype=torch.int64).view(rows),
        labels_BT=labels_BT.view(rows),
        image_B=torch.tensor([b if b < images else -1 for b in range(B)]),
        images_NHWC=torch.zeros(images, size, size, 3, dtype=torch.uint8) if images and model.has_vit else None,
        features_NFW=torch.zeros(images, model.vision.rows, model.vision.width)
        if images and not model.has_vit
        else None,
        visual_start=VISUAL_START if images else None,
        lengths_B=torch.full((B,), T),
        row_ids=[str(b) for b in range(B)],
        packed=(T,) * B if packing else None,
    )


def simulate(config: RunConfig, workload: Workload, gpus: int = 1, make: Callable[..., Lavin] = Lavin) -> Simulation:
    """One optimizer step of `config` on one of `gpus` ranks, without its memory. 20 s at 13B.

    Tensor-parallel ranks hold and compute their slices; the moments, and with ZeRO-3 the parameters, are divided over
    gpus / tensor_parallel data-parallel ranks. `make` builds the model; see build_on_meta.

    Raises:
        UserError: tensor_parallel does not divide `gpus`, or the workload cannot be.
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
    # The moments exist from the first step on: make them before the step that counts.
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tracker, trace = Tracker(tensor_parallel_size()), ModuleTrace()
    tracker.label((p for p in model.parameters() if not p.requires_grad), "frozen")
    tracker.label(trainable, "adapters")
    tracker.label((x for state in optimizer.state.values() for x in state.values()), "optimizer")
    tracker.label((x for x in vars(batch).values() if isinstance(x, torch.Tensor)), "batch")
    model.train()
    with linear_layers_of(plan), tracker, trace.of(model, tracker) if plan.gathers else nullcontext():
        tracker.enter_phase("forward")
        loss_sum, labels = model(batch)
        loss = loss_sum / max(labels, 1)
        tracker.enter_phase("backward")
        with warnings.catch_warnings():  # of ModuleTrace's hooks, where a module's inputs need no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()
        tracker.enter_phase("update")
        tracker.label((p.grad for p in trainable if p.grad is not None), "gradients")
        optimizer.step()
        tracker.enter_phase("end")
    if plan.gathers:
        for life in gathered_lives(plan, trace, tracker.phase_ends["backward"]):
            life.phase = "forward" if life.born < tracker.phase_ends["forward"] else "backward"
            tracker.lives.append(life)
            if life.operator == GATHERING:
                sent = life.bytes * (plan.ranks - 1) // plan.ranks
                tracker.operations.append(Operation(GATHERING, life.phase, 0, 0, exchanged=sent))
    if plan.ranks > 1:
        # Half of an all-reduce scatters sums, the other half gathers them, or the parameters updated by them. From
        # stage 2 on the first is done in every micro-batch; at stage 3 parameters are gathered when they are used.
        half = all_reduced(sum(p.numel() * p.element_size() for p in trainable), plan.ranks) // 2
        phase = "backward" if plan.stage >= 2 else "update"
        tracker.operations.append(Operation(REDUCING, phase, 0, 0, exchanged=half))
        if plan.stage < 3:
            tracker.operations.append(Operation(UPDATING, "update", 0, 0, exchanged=half))
    _label_the_rest(tracker, vocabulary=model.llm.output.weight.shape[0])
    return tracker


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
    """The peak over the step, what it is made of, and when it was.

    accumulates: the step is one of several micro-batches, so that gradients of earlier ones are held.
    """
    trainable = sum(life.bytes for life in tracker.lives if life.label == "adapters") // FP32
    held, peaks, moments = Counter(zero=plan.standing_bytes(trainable, accumulates)), {}, {}
    shares = {"optimizer": plan.optimizer_share, "frozen": plan.weight_share, "adapters": plan.weight_share}
    lives = [*tracker.lives, *_reduction_buckets(tracker, plan)]
    timeline, timeline_phases = [], []
    for life, grows in _in_order(lives):
        persists = plan.gathers and math.prod(life.shape) <= plan.persistence_threshold
        share = shares.get(life.label, 1.0) + (1.0 if persists and life.label in ("frozen", "adapters") else 0.0)
        bytes = int(life.bytes * share)
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


def _reduction_buckets(tracker: Tracker, plan: ZeroPlan) -> list[Life]:
    """Of stages 1 and 2: from the first gradient to the end of the backward pass."""
    born = [life.born for life in tracker.lives if life.label == "gradients"]
    if not born or plan.stage not in (1, 2):
        return []
    size = plan.buckets * plan.bucket_size
    return [
        Life(plan.bucket_bytes(), min(born), "backward", "reduction", (size,), "zero", tracker.phase_ends["backward"])
    ]


def _in_order(lives: Iterable[Life]) -> Iterable[tuple[Life, bool]]:
    """Births (True) and deaths (False) as they happened."""
    moments = [(life.born, life, True) for life in lives]
    moments += [(life.died, life, False) for life in lives if life.died != ALIVE]
    return [(life, grows) for _, life, grows in sorted(moments, key=lambda m: (m[0], not m[2]))]


@dataclass(frozen=True)
class Measured:
    """What a finished run recorded in its summary.json. peak_device_bytes is None where there was no GPU."""

    steps: int
    samples: int
    tokens: int
    seconds: float
    peak_rss_bytes: int  # of the largest rank: Python and libraries included
    peak_device_bytes: int | None
    trainable_parameters: int
    adapter_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.peak_rss_bytes if self.peak_device_bytes is None else self.peak_device_bytes

    def as_dict(self) -> dict:
        return asdict(self)


def measured(run: Path) -> Measured:
    """Reads a run directory's summary.

    Raises:
        UserError: there is none yet, or it lacks a key.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(f"{run} has no summary.json: the run is not complete. Finish it with --resume auto first.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["adapter_bytes"] = adapter_file(run).stat().st_size
        return Measured(**{f.name: summary[f.name] for f in fields(Measured)})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}. Was it made by another version?") from None
