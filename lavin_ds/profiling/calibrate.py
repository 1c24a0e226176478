"""A device's rates, from a few measured steps: what turns simulated operators into seconds on a real machine.

A phase of a step takes, for all its operators together,

    flops / matmul rate of their dtype  +  bytes of the others / bandwidth  +  operators * overhead  +  exchanged / link

Every constant holds for all models: none is fitted to the configuration whose time is predicted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from lavin_ds.profiling.memory import Simulation
from lavin_ds.profiling.tracker import Operation

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of each; 0 for what no measured step had."""

    flop: float  # of a matrix product or attention in fp32
    half_flop: float  # in bf16 or fp16
    byte: float  # read or written by an operator without a product
    operator: float  # started, whatever its size
    exchanged_byte: float  # in a collective

    def as_dict(self) -> dict:
        return asdict(self)

    def seconds(self, operations: list[Operation]) -> float:
        return float(amounts(operations) @ np.array(list(asdict(self).values())))


def amounts(operations: list[Operation]) -> np.ndarray:
    """What `operations` take of each of the Rates, in their order."""
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
    """The rates that explain the seconds of every phase best, in relative terms; none is negative.

    measured: steps as simulated, with their seconds by phase (measure.measure_seconds).
    """
    rows, weights = [], []
    for simulation, seconds in measured:
        whole = sum(seconds.values())
        for phase, taken in seconds.items():
            rows.append(amounts([o for o in simulation.operations if o.phase == phase]) / taken)
            weights.append((taken / whole) ** 0.5)  # a short phase says little about a step
    return Rates(*_nonnegative_least_squares(np.array(rows) * np.array(weights)[:, None], np.array(weights)))


def _nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimises |a x - b| over x >= 0, for a handful of columns: the best of all sets of columns that suit."""
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
