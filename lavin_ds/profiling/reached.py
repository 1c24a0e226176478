"""The share of a device's roofline that a finished run reached, to predict other runs on the same device with."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lavin_ds.devices import DEVICES, Device
from lavin_ds.errors import UserError
from lavin_ds.profiling.time import TimeEstimate
from lavin_ds.run import read_metrics

WARM_UP = 5  # steps of a run that are left out, where there are others


@dataclass(frozen=True)
class Reached:
    """A run's median step beside the predicted one, seconds; efficiency is what makes the prediction right."""

    run: str
    device: str
    steps: int  # that the median is of
    step_seconds: float
    predicted_seconds: float
    predicted_efficiency: float  # that was assumed; 1 where the device's rates were measured
    efficiency: float

    @property
    def is_possible(self) -> bool:
        """Faster than its roofline is no device; where rates were measured, the measurement was slowed down."""
        return 0 < self.efficiency <= 1 or self.predicted_efficiency == 1

    def calibrate(self, device: Device) -> tuple[Device, float]:
        """The device and the efficiency to predict with."""
        if device.rates:
            slower = {name: rate / self.efficiency for name, rate in asdict(device.rates).items()}
            return replace(device, rates=replace(device.rates, **slower)), 1.0
        return device, self.efficiency

    def as_dict(self) -> dict:
        return asdict(self)


def ran_on(device: Device, had_gpu: bool) -> bool:
    """Whether a run may have been on that device: a GPU of the list is not for a run without a GPU."""
    return had_gpu if device.name in DEVICES else device.rates is None or not had_gpu


def reached(run: Path, predicted: TimeEstimate) -> Reached:
    """`predicted`: of the run's own recipe and ranks, on the device it ran on.

    Raises:
        UserError: no step was written down.
    """
    taken = [line["seconds"] for line in read_metrics(run / "metrics.jsonl") if not line["skipped"]]
    if not taken:
        raise UserError(f"{run / 'metrics.jsonl'} tells the time of no step: there is nothing to calibrate with.")
    counted = taken[WARM_UP:] or taken
    seconds = statistics.median(counted)
    return Reached(
        run=run.name,
        device=predicted.device,
        steps=len(counted),
        step_seconds=seconds,
        predicted_seconds=predicted.step_seconds,
        predicted_efficiency=predicted.efficiency,
        efficiency=predicted.roofline_seconds / max(seconds - predicted.communication_seconds, 1e-9),
    )
