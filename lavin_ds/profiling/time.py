"""Time of a recipe, extrapolated: the operators of a simulated step on a roofline, times the steps.

An operator takes the longer of its arithmetic at the device's peak rate and its traffic at the device's
bandwidth; the sum is divided by an assumed efficiency. Left out: the ranks' exchange of gradients (15 MB a step
at 7B), loading, evaluation, and the waiting of one rank for another beyond what lengths explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lavin_ds.config import RunConfig
from lavin_ds.data.sampler import assign, global_batch_indices, micro_batches, total_steps
from lavin_ds.errors import UserError
from lavin_ds.parallel import check_world
from lavin_ds.profiling.memory import Simulation, Workload, simulate

DEFAULT_EFFICIENCY = 0.4  # assumed, not measured
STEPS_LOOKED_AT = 200  # optimizer steps whose lengths are averaged


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense (not sparse) bf16 with fp32 accumulation, memory bandwidth, memory."""

    name: str
    tflops: float  # 1e12 operations a second
    bandwidth: float  # 1e9 bytes a second
    memory: float  # 1e9 bytes, at least; data sheets write GB
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", 312, 1555, 40, "NVIDIA A100 data sheet, PCIe and SXM 40 GB"),
        Device("a100-80g", 312, 2039, 80, "NVIDIA A100 data sheet, SXM 80 GB"),
        Device("h100-80g", 989, 3350, 80, "NVIDIA H100 data sheet, SXM; half of its figure with sparsity"),
        Device("h200", 989, 4800, 141, "NVIDIA H200 data sheet; half of its figure with sparsity"),
        Device("l4", 121, 300, 24, "NVIDIA L4 data sheet; half of its figure with sparsity"),
        Device("rtx-3090", 71, 936, 24, "NVIDIA GA102 white paper, appendix A"),
        Device("rtx-4090", 165.2, 1008, 24, "NVIDIA Ada white paper, appendix A"),
    )
}


def device_named(name: str) -> Device:
    """Raises UserError for a device that is not in DEVICES."""
    if name not in DEVICES:
        raise UserError(f"No device '{name}': give one of {', '.join(DEVICES)}.")
    return DEVICES[name]


@dataclass(frozen=True)
class TrainingSet:
    """What a run's time depends on: positions of every sample with the modality token, and two shares."""

    lengths: np.ndarray  # [samples]
    image_fraction: float
    labelled_fraction: float  # of positions
    source: str


# ScienceQA's train split. Sizes and images: paper 1, section 4.1, and the official problems.json. The lengths are
# assumed: every 20th part of the distribution of 1,088 of its 12,726 samples (a real subset,
# biased towards hard items) with LLaMA's tokenizer, QCM-ALE and six visual tokens.
SCIENCEQA_SAMPLES = 12_726
SCIENCEQA_IMAGES = 6_218
LENGTH_QUANTILES = (
    *(49, 96, 174, 197, 212, 224, 240, 252, 264, 272),
    *(282, 289, 300, 320, 339, 366, 388, 428, 461, 493, 512),
)
LABELLED_FRACTION = 0.70  # of the same samples' positions


def scienceqa(max_length: int) -> TrainingSet:
    """ScienceQA's train split with the assumed lengths; mean 295 positions."""
    rank = (np.arange(SCIENCEQA_SAMPLES) + 0.5) / SCIENCEQA_SAMPLES
    lengths = np.interp(rank, np.linspace(0, 1, len(LENGTH_QUANTILES)), LENGTH_QUANTILES).round().astype(int)
    return TrainingSet(
        lengths=np.minimum(lengths, max_length),
        image_fraction=SCIENCEQA_IMAGES / SCIENCEQA_SAMPLES,
        labelled_fraction=LABELLED_FRACTION,
        source="12,726 ScienceQA samples, lengths assumed from 1,088 of them",
    )


def from_shards(directory: Path, visual_tokens: int) -> TrainingSet:
    """The train split of a shard directory, with its actual lengths."""
    from lavin_ds.data.shards import ShardReader

    reader = ShardReader(directory, "train")
    rows = reader.trainable
    if not len(rows):
        raise UserError(f"{directory} has no train sample with a label: prepare more data.")
    lengths = reader.lengths(visual_tokens)[rows] + 1
    return TrainingSet(
        lengths=lengths,
        image_fraction=float(reader.has_pixels[rows].mean()) if visual_tokens else 0.0,
        labelled_fraction=float(reader.label_counts[rows].sum() / lengths.sum()),
        source=f"{len(rows):,} samples of {directory}",
    )


@dataclass(frozen=True)
class Pace:
    """How a run walks through its training set; averages over steps.

    All ranks wait for the one with the most tokens, so it is the critical length that costs time.
    """

    steps: int  # optimizer steps
    micro_batches: int  # of a rank in a step
    samples: float  # of a micro-batch
    mean_length: float  # positions of a sample
    critical_length: float  # positions a sample, with padding, of the fullest of the ranks' micro-batches of a moment
    tokens: int  # positions of all samples of the run, without padding


def pace(training_set: TrainingSet, config: RunConfig, gpus: int) -> Pace:
    """Deals the recipe's first steps to ranks as training does, and looks at the lengths."""
    training = config.training
    check_world(gpus, config.tensor_parallel)
    ranks = gpus // config.tensor_parallel
    count, lengths = len(training_set.lengths), training_set.lengths
    per_rank = micro_batches(training.global_batch, ranks, training.micro_batch)
    steps = total_steps(count, training.epochs, training.global_batch)
    samples = training.global_batch / (ranks * per_rank)
    no_image = np.zeros(training.global_batch, dtype=bool)  # which samples have one is not known
    critical = []
    for step in range(min(steps, STEPS_LOOKED_AT)):
        chosen = global_batch_indices(count, training.global_batch, training.seed, step)
        dealt = assign(chosen, lengths[chosen], no_image, ranks, training.micro_batch)
        padded = [[len(piece) * lengths[piece].max() for piece in part] for part in dealt]
        critical += [positions / samples for positions in np.max(padded, axis=0)]
    return Pace(
        steps=steps,
        micro_batches=per_rank,
        samples=samples,
        mean_length=float(lengths.mean()),
        critical_length=float(np.mean(critical)),
        tokens=int(lengths.mean() * steps * training.global_batch),
    )


@dataclass(frozen=True)
class TimeEstimate:
    """Extrapolated time of a whole recipe. step_seconds is of one optimizer step."""

    device: str
    gpus: int
    efficiency: float
    hours: float
    step_seconds: float
    step_flops: float  # of one rank
    roofline_seconds: float  # of one optimizer step at efficiency 1
    pace: Pace
    assumption: str

    def as_dict(self) -> dict:
        return asdict(self)


def estimate(
    config: RunConfig,
    training_set: TrainingSet,
    device: Device,
    gpus: int,
    efficiency: float = DEFAULT_EFFICIENCY,
) -> TimeEstimate:
    """Hours for the whole recipe on `gpus` devices."""
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency is {efficiency}: it must lie above 0 and at most at 1.")
    walk = pace(training_set, config, gpus)
    flops, seconds = _micro_step(config, training_set, walk, device)
    roofline = walk.micro_batches * seconds
    step_seconds = roofline / efficiency
    return TimeEstimate(
        device=device.name,
        gpus=gpus,
        efficiency=efficiency,
        hours=walk.steps * step_seconds / 3600,
        step_seconds=step_seconds,
        step_flops=walk.micro_batches * flops,
        roofline_seconds=roofline,
        pace=walk,
        assumption=(
            f"{device.name} at {efficiency:.0%} of its roofline; {training_set.source}, mean "
            f"{walk.mean_length:.0f} positions; {walk.critical_length:.0f} with padding and with the waiting for "
            "the rank that holds the most at the time"
        ),
    )


def roofline_seconds(simulation: Simulation, device: Device) -> float:
    """The simulated micro-batch at the device's peak rates."""
    rate, bandwidth = device.tflops * 1e12, device.bandwidth * 1e9
    return sum(max(o.flops / rate, o.bytes / bandwidth) for o in simulation.operations)


def _micro_step(config, training_set: TrainingSet, walk: Pace, device: Device) -> tuple[float, float]:
    """FLOPs and roofline seconds of the average micro-batch."""
    samples = max(1, round(walk.samples))
    images = samples * training_set.image_fraction if config.model.vision else 0.0
    low, share = math.floor(images), images % 1
    labelled = training_set.labelled_fraction * walk.mean_length / walk.critical_length

    def measure(count: int) -> np.ndarray:
        workload = Workload(samples, round(walk.critical_length), count / samples, labelled)
        return linear_in_layers(
            config, workload, lambda s: np.array([s.flops(), roofline_seconds(s, device)], dtype=float)
        )

    # A whole number of images is simulated, so an average between two numbers takes both.
    costs = measure(low) if not share else (1 - share) * measure(low) + share * measure(low + 1)
    costs = costs * walk.samples / samples
    return float(costs[0]), float(costs[1])


def linear_in_layers(config: RunConfig, workload: Workload, measure: Callable[[Simulation], np.ndarray]):
    """`measure` of a step of the whole model, from models with one and two parts of each tower.

    A part is a LLaMA layer, or the ViT's blocks from one [cls] token that is read out to the next. All parts of
    a tower do the same work, so any sum over operators is linear in their numbers: exact, and ten times faster.
    """
    small = _with_parts(config, 1, 1)
    base = measure(simulate(small, workload, config.tensor_parallel))
    total = base
    layers, groups = config.model.llm.n_layers, config.model.visual_tokens
    if layers > 1:
        total = total + (layers - 1) * (
            measure(simulate(_with_parts(config, 2, 1), workload, config.tensor_parallel)) - base
        )
    if groups > 1:
        total = total + (groups - 1) * (
            measure(simulate(_with_parts(config, 1, 2), workload, config.tensor_parallel)) - base
        )
    return total


def _with_parts(config: RunConfig, layers: int, groups: int) -> RunConfig:
    """The recipe with `layers` LLaMA layers and `groups` visual tokens."""
    model = config.model
    update = {"llm": model.llm.model_copy(update={"n_layers": layers})}
    if model.vision:
        blocks = groups * model.vision.cls_every
        update["vision"] = model.vision.model_copy(update={"layers": blocks})
    return config.model_copy(update={"model": model.model_copy(update=update)})
