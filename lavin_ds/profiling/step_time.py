"""The extrapolated time of a recipe: the operators of a simulated step on a roofline, times the number of steps.

Each operator takes the longer of two times: its arithmetic at the device's peak rate, and its memory traffic at the
device's bandwidth. The sum over operators is divided by an assumed efficiency. Communication (gradients, the sums of
tensor parallelism, ZeRO-3's gathering) is added at the speed of the device's link. Loading and evaluation are left out.
Ranks wait for each other only because of different lengths.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from lavin_ds.config import RunConfig
from lavin_ds.data.sampler import assign, global_batch_indices, micro_batches, total_steps
from lavin_ds.devices import GB, Device
from lavin_ds.errors import UserError
from lavin_ds.models.counting import count_parameters
from lavin_ds.parallel import check_world
from lavin_ds.profiling.calibration import roofline_seconds
from lavin_ds.profiling.layers import from_few_layers
from lavin_ds.profiling.simulation import Simulation
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import Workload
from lavin_ds.profiling.zero import ZERO_OPERATIONS, zero_plan

DEFAULT_EFFICIENCY = 0.4  # assumed, not measured
SAMPLED_STEPS = 200  # optimizer steps whose lengths are averaged


@dataclass(frozen=True)
class Pace:
    """Steps and lengths of a run over its training set, averaged over steps.

    All ranks wait for the one with the most positions, so the critical length decides the time.
    """

    steps: int  # optimizer steps
    micro_batches: int  # per rank and step
    samples: float  # per micro-batch
    mean_length: float  # positions per sample
    critical_length: float  # positions per sample, with padding, on the rank with the most in each micro-batch
    tokens: int  # positions of all samples in the run, without padding


def pace(training_set: TrainingSet, config: RunConfig, gpus: int) -> Pace:
    """The pace of a run. Deals the samples of the first steps to ranks as training does."""
    training = config.training
    check_world(gpus, config.tensor_parallel)
    ranks = gpus // config.tensor_parallel
    count, lengths = len(training_set.lengths), training_set.lengths
    per_rank = micro_batches(training.global_batch, ranks, training.micro_batch)
    steps = total_steps(count, training.epochs, training.global_batch)
    samples = training.global_batch / (ranks * per_rank)
    no_image = np.zeros(training.global_batch, dtype=bool)  # which samples have an image is not known
    critical = []
    for step in range(min(steps, SAMPLED_STEPS)):
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
    """Positions computed for a micro-batch of samples with these lengths, padding included."""
    return int(lengths.sum()) if packing else len(lengths) * int(lengths.max())


@dataclass(frozen=True)
class TimeEstimate:
    """Extrapolated time, energy and price of a whole recipe. A step is an optimizer step."""

    device: str
    gpus: int
    efficiency: float
    hours: float
    step_seconds: float
    step_flops: float  # of one rank in one optimizer step
    roofline_seconds: float  # of one optimizer step at efficiency 1, without communication
    communication_seconds: float  # of one optimizer step; none is hidden behind arithmetic
    exchanged_bytes: int  # sent by a rank in one optimizer step
    kilowatt_hours: float | None  # of the GPUs only, at full board power
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
    """The time of the whole recipe on `gpus` devices. `price` is for one GPU and one hour.

    Raises:
        UserError: efficiency is not above 0 and at most 1.
    """
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
            f"{walk.mean_length:.0f} positions; {walk.critical_length:.0f} with padding and with waiting for the rank "
            "that has the most"
        ),
    )


def labelled_share(training_set: TrainingSet, walk: Pace) -> float:
    """The share of an average micro-batch's positions that have a label; padding has none."""
    return min(1.0, training_set.labelled_fraction * walk.mean_length / walk.critical_length)


class MicroStep(NamedTuple):
    """What one rank computes and sends per micro-batch."""

    flops: float
    roofline_seconds: float
    shared: float  # bytes of activations sent within a tensor-parallel group
    exchanged: float  # bytes of gradients and parameters sent per micro-batch
    exchanged_once: float  # bytes of gradients and parameters sent once per optimizer step


def micro_step(simulation: Simulation, device: Device) -> MicroStep:
    sent = [o for o in simulation.operations if o.exchanged]
    once = sum(o.exchanged for o in sent if o.phase == "update")
    every = sum(o.exchanged for o in sent if o.phase != "update" and o.name in ZERO_OPERATIONS)
    shared = sum(o.exchanged for o in sent) - once - every
    return MicroStep(simulation.flops(), roofline_seconds(device, simulation.operations), shared, every, once)


def _micro_step(config, training_set: TrainingSet, walk: Pace, device: Device, gpus: int) -> MicroStep:
    """The costs of the average micro-batch."""
    samples = max(1, round(walk.samples))
    images = samples * training_set.image_fraction if config.model.vision else 0.0
    low, share = math.floor(images), images % 1
    labelled = labelled_share(training_set, walk)

    def measure(count: int) -> np.ndarray:
        workload = Workload(samples, round(walk.critical_length), count / samples, labelled)
        return from_few_layers(config, workload, lambda s: np.array(micro_step(s, device)), gpus)

    # A simulated micro-batch has a whole number of images, so a fraction is interpolated.
    costs = measure(low) if not share else (1 - share) * measure(low) + share * measure(low + 1)
    step, scale = MicroStep(*costs), walk.samples / samples
    count, degree = count_parameters(config), config.tensor_parallel
    elements = count.frozen["llm"] // degree + count.frozen["vision"] + count.trainable
    traffic = zero_plan(config, gpus).traffic(count.trainable, elements, count.loaded_bytes(degree))
    return MicroStep(
        flops=step.flops * scale,
        roofline_seconds=step.roofline_seconds * scale,
        shared=step.shared * scale,
        exchanged=sum(o.exchanged for o in traffic if o.phase != "update"),
        exchanged_once=sum(o.exchanged for o in traffic if o.phase == "update"),
    )
