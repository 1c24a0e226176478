"""The time of simulated operators, from a device's data sheet or from rates fitted to measured steps.

With measured rates, the operators of a phase together take

    FLOPs of products / rate of their dtype  +  bytes of other operators / bandwidth  +  calls * overhead
        +  bytes sent / link

The same rates serve all models. None is fitted to the configuration whose time is predicted.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import combinations

import numpy as np

from lavin_ds.config import load_recipe
from lavin_ds.devices import DEVICES, GB, Device, Rates
from lavin_ds.errors import UserError
from lavin_ds.profiling.simulation import Simulation, simulate
from lavin_ds.profiling.tracker import Operation
from lavin_ds.profiling.workload import Workload

HALF = ("bfloat16", "float16")
HERE = "here"


def device_named(name: str, gpus: int = 1) -> Device:
    """A device by its name. "here" is this machine's CPU, shared by `gpus` ranks and measured now (half a minute).

    Raises:
        UserError: there is no device of that name.
    """
    if name == HERE:
        return this_cpu(gpus)
    if name not in DEVICES:
        raise UserError(f"No device '{name}'. Known are {', '.join(DEVICES)}, and {HERE} for this CPU.")
    return DEVICES[name]


def roofline_seconds(device: Device, operations: list[Operation]) -> float:
    """Seconds of all operators except communication, at measured rates or else at the data sheet's peak rates."""
    operations = [o for o in operations if not o.exchanged]
    if device.rates:
        return seconds_at(device.rates, operations)
    rate, bandwidth = device.tflops * 1e12, device.bandwidth * GB
    return sum(max(o.flops / rate, o.bytes / bandwidth) for o in operations)


def seconds_at(rates: Rates, operations: list[Operation]) -> float:
    """Seconds of the operators at measured rates, communication included."""
    return float(amounts(operations) @ np.array(list(rates.as_dict().values())))


# Overrides and samples of the models for `this_cpu`. A step of each takes less than a second. They differ in how it is
# divided between products, other operators and calls.
CALIBRATION_MODELS = (
    (["model.llm={dim: 256, n_layers: 4, n_heads: 4, ffn_dim: 704, vocab_size: 8192}", "model.frozen_dtype=fp32"], 4),
    (["model.llm={dim: 512, n_layers: 6, n_heads: 8, ffn_dim: 1408, vocab_size: 8192}", "model.frozen_dtype=fp32"], 1),
    (["model.llm={dim: 384, n_layers: 6, n_heads: 6, ffn_dim: 1024, vocab_size: 8192}"], 4),
    (["model.llm={dim: 768, n_layers: 4, n_heads: 12, ffn_dim: 2048, vocab_size: 8192}"], 1),
)


def this_cpu(ranks: int = 1) -> Device:
    """One rank's share of this machine's CPU. Its rates come from real steps of four small models (half a minute)."""
    import psutil

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints a warning to stdout
    from lavin_ds.profiling.measure import in_fresh_processes, measure_seconds

    settings = []
    for changes, samples in CALIBRATION_MODELS:
        changes = [*changes, "model.vision=null", "deepspeed=zero0", f"training.global_batch={samples}"]
        workload = Workload(samples, 128, image_fraction=0.0, labelled_fraction=0.7)
        settings.append((load_recipe("lavin-7b", changes), workload))
    # Measure before simulating: a simulation starts threads, and a forked process could wait forever for their locks.
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)  # as in training
    seconds = [in_fresh_processes(1, 1, partial(measure_seconds, *setting), threads) for setting in settings]
    measured = [(simulate(*setting), taken) for setting, taken in zip(settings, seconds, strict=True)]
    rates = fit_rates(measured)
    return Device(
        name="this CPU",
        tflops=1e-12 / (rates.half_flop or rates.flop),
        bandwidth=1e-9 / rates.byte if rates.byte else None,
        memory=psutil.virtual_memory().total / GB,
        watts=None,
        link=1.0,  # gloo over the loopback of one machine, roughly
        source=f"{len(measured)} training steps on {threads} thread(s), measured at the time",
        rates=rates,
    )


def amounts(operations: list[Operation]) -> np.ndarray:
    """The work in `operations`, in the units and the order of the fields of Rates."""
    total = np.zeros(5)
    for operation in operations:
        if operation.exchanged:
            total[4] += operation.exchanged
            continue
        if operation.flops:
            total[1 if operation.dtype in HALF else 0] += operation.flops
        else:
            total[2] += operation.bytes
        total[3] += 1
    return total


def fit_rates(measured: list[tuple[Simulation, dict[str, float]]]) -> Rates:
    """Fits rates to the measured seconds of every phase. Minimises relative squared errors; no rate is negative.

    measured: simulated steps, each with its measured seconds by phase (measure.measure_seconds).
    """
    rows, weights = [], []
    for simulation, seconds in measured:
        whole = sum(seconds.values())
        for phase, taken in seconds.items():
            rows.append(amounts([o for o in simulation.operations if o.phase == phase]) / taken)
            weights.append((taken / whole) ** 0.5)  # a short phase matters little to the step
    return Rates(*_nonnegative_least_squares(np.array(rows) * np.array(weights)[:, None], np.array(weights)))


def _nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimises |a x - b| over x >= 0. Tries every subset of the columns, which are few."""
    best, best_error = np.zeros(a.shape[1]), float(b @ b)
    scale = np.where(a.any(axis=0), a.max(axis=0), 1.0)  # FLOPs and operators differ by 1e9
    for size in range(1, a.shape[1] + 1):
        for columns in map(list, combinations(np.flatnonzero(a.any(axis=0)), size)):
            x, *_ = np.linalg.lstsq(a[:, columns] / scale[columns], b, rcond=None)
            error = float(np.sum((a[:, columns] / scale[columns] @ x - b) ** 2))
            if (x >= 0).all() and error < best_error:
                best, best_error = np.zeros(a.shape[1]), error
                best[columns] = x / scale[columns]
    return best
