"""Time of a recipe, extrapolated: the operators of a simulated step on a roofline, times the steps.

An operator takes the longer of its arithmetic at the device's peak rate and its traffic at the device's
bandwidth; the sum is divided by an assumed efficiency. What ranks send to one another (gradients, the sums of tensor
parallelism, ZeRO-3's gathering) goes at the speed of the device's link and is added. Left out: loading, evaluation, and
the waiting of one rank for another beyond what lengths explain.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lavin_ds.config import RunConfig
from lavin_ds.data.sampler import assign, global_batch_indices, micro_batches, total_steps
from lavin_ds.devices import GB, Device
from lavin_ds.errors import UserError
from lavin_ds.parallel import check_world
from lavin_ds.profiling.calibrate import roofline_seconds
from lavin_ds.profiling.layers import from_few_layers
from lavin_ds.profiling.memory import ZERO_OPERATIONS, Simulation, Workload, simulate
from lavin_ds.profiling.zero import zero_plan

DEFAULT_EFFICIENCY = 0.4  # assumed, not measured
STEPS_LOOKED_AT = 200  # optimizer steps whose lengths are averaged


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
    critical = []  # positions a sample of the fullest micro-batch of a moment
    for step in range(min(steps, STEPS_LOOKED_AT)):
        chosen = global_batch_indices(count, training.global_batch, training.seed, step)
        dealt = assign(chosen, lengths[chosen], no_image, ranks, training.micro_batch, training.packing)
        filled = [[_positions(lengths[piece], training.packing) for piece in part] for part in dealt]
        critical += [positions / samples for positions in np.max(filled, axis=0)]
    return Pace(
        steps=steps,
        micro_batches=per_rank,
        samples=samples,
        mean_length=float(lengths.mean()),
        critical_length=float(np.mean(critical)),
        tokens=int(lengths.mean() * steps * training.global_batch),
    )


def _positions(lengths: np.ndarray, packing: bool) -> int:
    """That a micro-batch of these samples is computed on, padding included."""
    return int(lengths.sum()) if packing else len(lengths) * int(lengths.max())


@dataclass(frozen=True)
class TimeEstimate:
    """Extrapolated time, energy and price of a whole recipe. step_seconds is of one optimizer step."""

    device: str
    gpus: int
    efficiency: float
    hours: float
    step_seconds: float
    step_flops: float  # of one rank
    roofline_seconds: float  # of one optimizer step at efficiency 1, without communication
    communication_seconds: float  # of one optimizer step, none of it hidden behind arithmetic
    exchanged_bytes: int  # that a rank sends in one optimizer step
    kilowatt_hours: float | None  # of the GPUs alone, at their full board power
    price: float | None  # of all GPU hours
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
    price: float | None = None,
) -> TimeEstimate:
    """Hours for the whole recipe on `gpus` devices; `price` is of one GPU for one hour."""
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency is {efficiency}: it must lie above 0 and at most at 1.")
    if device.rates:
        efficiency = 1.0  # measured, not assumed
    walk = pace(training_set, config, gpus)
    costs = _micro_step(config, training_set, walk, device, gpus)
    roofline = walk.micro_batches * costs.roofline_seconds
    exchanged = walk.micro_batches * (costs.shared + costs.exchanged) + costs.exchanged_once
    communication = exchanged / (device.link * GB)
    step_seconds = roofline / efficiency + communication
    hours = walk.steps * step_seconds / 3600
    speed = f"rates of {device.source}" if device.rates else f"{efficiency:.0%} of its roofline"
    return TimeEstimate(
        device=device.name,
        gpus=gpus,
        efficiency=efficiency,
        hours=hours,
        step_seconds=step_seconds,
        step_flops=walk.micro_batches * costs.flops,
        roofline_seconds=roofline,
        communication_seconds=communication,
        exchanged_bytes=int(exchanged),
        kilowatt_hours=hours * gpus * device.watts / 1000 if device.watts else None,
        price=None if price is None else hours * gpus * price,
        pace=walk,
        assumption=(
            f"{device.name} at {speed}; {training_set.source}, mean "
            f"{walk.mean_length:.0f} positions; {walk.critical_length:.0f} with padding and with the waiting for "
            "the rank that holds the most at the time"
        ),
    )


def labelled_share(training_set: TrainingSet, walk: Pace) -> float:
    """Of the positions that an average micro-batch computes, those with a label; padding has none."""
    return min(1.0, training_set.labelled_fraction * walk.mean_length / walk.critical_length)


class MicroStep(NamedTuple):
    """What one rank does for one micro-batch. `shared` grows with its positions, what ZeRO sends does not."""

    flops: float
    roofline_seconds: float
    shared: float  # bytes of activations sent within a tensor-parallel group
    exchanged: float  # bytes of gradients and parameters sent in every micro-batch
    exchanged_once: float  # and in every optimizer step


def micro_step(simulation: Simulation, device: Device) -> MicroStep:
    sent = [o for o in simulation.operations if o.exchanged]
    once = sum(o.exchanged for o in sent if o.phase == "update")
    every = sum(o.exchanged for o in sent if o.phase != "update" and o.name in ZERO_OPERATIONS)
    shared = sum(o.exchanged for o in sent) - once - every
    return MicroStep(simulation.flops(), roofline_seconds(device, simulation.operations), shared, every, once)


def _micro_step(config, training_set: TrainingSet, walk: Pace, device: Device, gpus: int) -> MicroStep:
    """Of the average micro-batch."""
    samples = max(1, round(walk.samples))
    images = samples * training_set.image_fraction if config.model.vision else 0.0
    low, share = math.floor(images), images % 1
    labelled = labelled_share(training_set, walk)

    def measure(count: int) -> np.ndarray:
        workload = Workload(samples, round(walk.critical_length), count / samples, labelled)
        return from_few_layers(config, workload, lambda s: np.array(micro_step(s, device)), gpus)

    # A whole number of images is simulated, so an average between two numbers takes both.
    costs = measure(low) if not share else (1 - share) * measure(low) + share * measure(low + 1)
    grown = MicroStep(*costs)
    scale = walk.samples / samples
    if zero_plan(config, gpus).gathers:
        # What is gathered twice depends on how much lies between two uses: it is not linear in the layers.
        workload = Workload(samples, round(walk.critical_length), low / samples, labelled)
        grown = grown._replace(exchanged=micro_step(simulate(config, workload, gpus), device).exchanged)
    return grown._replace(
        flops=grown.flops * scale, roofline_seconds=grown.roofline_seconds * scale, shared=grown.shared * scale
    )
