"""The measurements of a finished run, and its speed compared with the prediction."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from lavin_ds.devices import DEVICES, Device
from lavin_ds.errors import UserError
from lavin_ds.profiling.step_time import TimeEstimate, estimate
from lavin_ds.profiling.training_set import find_training_set
from lavin_ds.run import RunRecord, adapter_file, load_run, read_metrics

WARM_UP = 5  # first steps, left out of the median if the run has more


@dataclass(frozen=True)
class Measured:
    """The measurements in a run's summary.json. peak_device_bytes is None if the run had no GPU."""

    steps: int
    samples: int
    tokens: int
    seconds: float
    peak_rss_bytes: int  # of the rank with the most, Python and libraries included
    peak_device_bytes: int | None
    trainable_parameters: int
    adapter_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.peak_rss_bytes if self.peak_device_bytes is None else self.peak_device_bytes

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class FinishedRun:
    path: Path
    record: RunRecord
    measured: Measured


def load_finished_run(path: Path) -> FinishedRun:
    """Reads a run directory.

    Raises:
        UserError: the run is not finished, or one of its files cannot be read.
    """
    return FinishedRun(path, load_run(path), read_measured(path))


def read_measured(run: Path) -> Measured:
    """Reads summary.json of a run directory.

    Raises:
        UserError: there is no summary yet, or it lacks a key.
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


@dataclass(frozen=True)
class RunSpeed:
    """A run's median step and the predicted one, in seconds. With `efficiency` the prediction would have been right."""

    run: str
    device: str
    steps: int  # that the median is taken over
    step_seconds: float
    predicted_seconds: float
    predicted_efficiency: float  # assumed; 1 if the device's rates were measured
    efficiency: float

    @property
    def is_possible(self) -> bool:
        """False if the run beat a data sheet's roofline. Measured rates can be beaten: they may be too low."""
        return 0 < self.efficiency <= 1 or self.predicted_efficiency == 1

    def calibrate(self, device: Device) -> tuple[Device, float]:
        """The device and the efficiency that predict other runs at this run's speed."""
        if device.rates:
            slower = {name: rate / self.efficiency for name, rate in asdict(device.rates).items()}
            return replace(device, rates=replace(device.rates, **slower)), 1.0
        return device, self.efficiency

    def as_dict(self) -> dict:
        return asdict(self)


def speed_of(run: FinishedRun, device: Device, efficiency: float) -> RunSpeed | None:
    """A run's speed on `device`. None if it ran on another device, or if its time cannot be predicted."""
    config, had_gpu = run.record.config, run.measured.peak_device_bytes is not None
    may_be_its_device = had_gpu if device.name in DEVICES else device.rates is None or not had_gpu
    training_set = find_training_set(config, run.record)
    if not may_be_its_device or not device.predicts_time_of(config.model.frozen_dtype) or training_set is None:
        return None
    return _speed(run.path, estimate(config, training_set, device, run.record.ranks, efficiency))


def _speed(run: Path, predicted: TimeEstimate) -> RunSpeed:
    taken = [line["seconds"] for line in read_metrics(run / "metrics.jsonl") if not line["skipped"]]
    if not taken:
        raise UserError(f"{run / 'metrics.jsonl'} has no completed step, so the run's speed is unknown.")
    counted = taken[WARM_UP:] or taken
    seconds = statistics.median(counted)
    return RunSpeed(
        run=run.name,
        device=predicted.device,
        steps=len(counted),
        step_seconds=seconds,
        predicted_seconds=predicted.step_seconds,
        predicted_efficiency=predicted.efficiency,
        efficiency=predicted.roofline_seconds / max(seconds - predicted.communication_seconds, 1e-9),
    )
