"""The cost report: a recipe's figures beside the published ones. A mark on each says how it was obtained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavin_ds.config import RunConfig, recomputed_layers
from lavin_ds.devices import GB, GPUS_PER_NODE, OVERHEAD, Device
from lavin_ds.errors import UserError
from lavin_ds.models.counting import ParameterCount, count_parameters
from lavin_ds.parallel import check_world
from lavin_ds.profiling import paper
from lavin_ds.profiling.finished_run import FinishedRun, RunSpeed, speed_of
from lavin_ds.profiling.simulation import Simulation, simulate
from lavin_ds.profiling.step_time import DEFAULT_EFFICIENCY, TimeEstimate, estimate
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import worst_case
from lavin_ds.profiling.zero import zero_plan

if TYPE_CHECKING:
    from lavin_ds.profiling.published.savings import AsPublished

QUOTED, EXACT, SIMULATED, EXTRAPOLATED, MEASURED = "quoted", "exact", "simulated", "extrapolated", "measured"
LEGEND = {
    QUOTED: "printed in the papers or the authors' README",
    EXACT: "counted from the model itself",
    SIMULATED: "one training step of the full model on tensors without memory. Only tensors are counted; the row as "
    f"published also includes {OVERHEAD / GB:.1f} GB for context, workspaces and fragmentation",
    EXTRAPOLATED: "the operators of simulated steps on the device's roofline, times the recipe's steps",
    MEASURED: "recorded by the finished run",
}
# The published row that a recipe is compared with.
PAPER_ROW = {"lavin-7b": "LaVIN-7B", "lavin-7b-24gb": "LaVIN-7B", "lavin-13b": "LaVIN-13B"}


@dataclass(frozen=True)
class Cell:
    """A figure as shown, its mark (a key of LEGEND; None if there is no figure) and its plain value."""

    text: str
    mark: str | None = None
    value: float | None = None

    def as_dict(self) -> dict:
        return {"text": self.text, "mark": self.mark, "value": self.value}


NOTHING = Cell("-")
COLUMNS = ("trainable", "memory", "time", "storage")  # parameters, bytes, hours, bytes


@dataclass(frozen=True)
class Row:
    method: str
    cells: dict[str, Cell]  # by COLUMNS

    def as_dict(self) -> dict:
        return {"method": self.method} | {name: cell.as_dict() for name, cell in self.cells.items()}


@dataclass(frozen=True)
class Request:
    """The inputs of a report."""

    config: RunConfig
    device: Device
    gpus: int
    training_set: TrainingSet | None  # None if its lengths are not known: the report then has no time
    efficiency: float = DEFAULT_EFFICIENCY
    length: int | None = None  # positions per sample for the simulated memory; None: the recipe's maximum
    price: float | None = None  # of one GPU for one hour
    run: FinishedRun | None = None  # shown beside the prediction
    at_run_speed: bool = False  # predict with the efficiency that `run` reached


@dataclass(frozen=True)
class Report:
    config: RunConfig
    device: Device
    gpus: int
    parameters: ParameterCount
    memory: Simulation
    time: TimeEstimate | None  # None if it cannot be predicted: see Report.notes
    run: FinishedRun | None = None
    run_speed: RunSpeed | None = None  # None if the run was not on `device`
    published: AsPublished | None = None  # with --as-published

    @property
    def published_memory(self) -> float | None:
        """The GB that the papers print for this recipe."""
        method = PAPER_ROW.get(self.config.name)
        return next((float(row.memory.rstrip("G")) for row in paper.COST_TABLE if row.method == method), None)

    def rows(self) -> list[Row]:
        """The rows of the papers, then of the authors' README, then ours."""
        rows = [_quoted(row) for row in (*paper.COST_TABLE, *paper.LITE_TABLE)]
        if self.published:
            rows.append(self._as_published_row())
        rows.append(self._our_row())
        if self.run:
            rows.append(self._measured_row())
        return rows

    def _our_row(self) -> Row:
        hours = Cell(duration(self.time.hours * 3600), EXTRAPOLATED, self.time.hours) if self.time else NOTHING
        return Row(
            f"{self.config.name} (here)",
            {
                "trainable": _exact(self.parameters.trainable),
                "memory": Cell(_gb(self.memory.peak_bytes), SIMULATED, self.memory.peak_bytes),
                "time": hours,
                "storage": _file(self.parameters.adapter_file_bytes),
            },
        )

    def _as_published_row(self) -> Row:
        bytes = self.published.with_overhead
        return Row(
            f"{self.config.name}, as published",
            {
                "trainable": _exact(self.parameters.trainable),
                "memory": Cell(_gb(bytes), SIMULATED, bytes),
                "time": NOTHING,
                "storage": NOTHING,
            },
        )

    def _measured_row(self) -> Row:
        run, seconds = self.run.measured, self.run.measured.seconds
        return Row(
            f"{self.run.path.name} (this run)",
            {
                "trainable": Cell(f"{run.trainable_parameters:,}", MEASURED, run.trainable_parameters),
                "memory": Cell(_gb(run.peak_bytes), MEASURED, run.peak_bytes),
                "time": Cell(duration(seconds), MEASURED, seconds / 3600),
                "storage": Cell(f"{run.adapter_bytes / 1e6:.1f} MB", MEASURED, run.adapter_bytes),
            },
        )

    @property
    def fits(self) -> bool:
        return max(self.memory.peak_bytes, self._loaded_bytes) + OVERHEAD < self.device.memory * GB

    @property
    def _loaded_bytes(self) -> int:
        return self.parameters.loaded_bytes(self.config.tensor_parallel)

    def notes(self) -> list[str]:
        """Sentences that explain the figures: what was simulated, on which assumptions, and what is left out."""
        workload, config = self.memory.workload, self.config
        checkpointing = _recomputation(config)
        notes = [
            f"Memory: a micro-batch of {workload.samples} x {workload.length} positions, "
            f"{workload.images} with an image, {workload.labelled_fraction:.0%} labelled, {checkpointing}. "
            f"The peak is in {self.memory.moment}. With {OVERHEAD / GB:.1f} GB for context, workspaces and "
            f"fragmentation, it is {'below' if self.fits else 'ABOVE'} the {self.device.memory:.0f} GB of "
            f"{self.device.name}.",
        ]
        if self._loaded_bytes > self.memory.peak_bytes:
            notes.append(
                f"Loading: DeepSpeed moves the whole model, {_gb(self._loaded_bytes)}, to every GPU before ZeRO-3 "
                "divides it. That must fit too."
            )
        plan = zero_plan(self.config, self.gpus)
        if plan.offload_parameters:
            notes.append("offload_param: memory is counted as if the parameters stayed on the GPU.")
        if plan.offload_parameters or plan.offload_optimizer:
            notes.append("Offloading: copies between GPU and host are not counted in the time.")
        if self.time:
            notes.append(f"Time: {self.gpus} x {self.time.assumption}. {self._communication()}")
            notes.append(f"For the whole recipe: {self._totals()}.")
        elif not self.device.predicts_time_of(self.config.model.frozen_dtype):
            notes.append("Time: none, because the base is fp32 and the devices' rates are for bf16.")
        else:
            kind = self.config.data.prompt_format
            notes.append(f"Time: none, because the lengths of {kind} data are not known: give --data SHARDS.")
        if self.run_speed:
            notes.append(self._run_speed())
        if self.run and self.run.measured.peak_device_bytes is None:
            notes.append("The run had no GPU. Its memory is the largest resident set of a rank, Python included.")
        return notes

    def _communication(self) -> str:
        time = self.time
        if not time.exchanged_bytes:
            return "GPUs exchange nothing."
        nodes = f", as if all {self.gpus} were in one node" if self.gpus > GPUS_PER_NODE else ""
        return (
            f"Each GPU sends {time.exchanged_bytes / 1e6:,.0f} MB per step, which takes "
            f"{time.communication_seconds / time.step_seconds:.1%} of the step at {self.device.link:.0f} GB/s{nodes}."
        )

    def _run_speed(self) -> str:
        speed = self.run_speed
        text = (
            f"{speed.run} took {duration(speed.step_seconds)} per step (median of {speed.steps:,}). The prediction was "
            f"{duration(speed.predicted_seconds)}. "
        )
        if speed.predicted_efficiency == 1:
            return text + f"The run reached {speed.efficiency:.0%} of the speed measured just now."
        if not speed.is_possible:
            return text + f"That is faster than the roofline of {speed.device}, so it ran on another device."
        assumed = f"the prediction assumed {speed.predicted_efficiency:.0%}"
        return text + f"The run reached {speed.efficiency:.0%} of the roofline; {assumed}."

    def _totals(self) -> str:
        time = self.time
        parts = [f"{time.pace.steps:,} steps", f"{time.pace.tokens / 1e6:.0f} million tokens"]
        if not self.device.rates:
            parts += [f"{time.hours * time.gpus:.1f} GPU hours"]
        if time.kilowatt_hours is not None:
            parts.append(f"{time.kilowatt_hours:.1f} kWh at the GPUs' full board power")
        if time.price is not None:
            parts.append(f"{time.price:,.2f} at the given price")
        return ", ".join(parts)

    def as_dict(self) -> dict:
        """What --json prints. Bytes, seconds, hours and counts are plain numbers."""
        return {
            "recipe": self.config.name,
            "source": self.config.source,
            "device": self.device.as_dict(),
            "gpus": self.gpus,
            "fits": self.fits,
            "parameters": self.parameters.as_dict(),
            "memory": self.memory.as_dict(),
            "time": self.time.as_dict() if self.time else None,
            "measured": self.run.measured.as_dict() if self.run else None,
            "reached": self.run_speed.as_dict() if self.run_speed else None,
            "as_published": self.published.as_dict() if self.published else None,
            "overhead_bytes": int(OVERHEAD),
            "table": [row.as_dict() for row in self.rows()],
            "legend": LEGEND,
            "notes": self.notes(),
            "disagreements": list(paper.DISAGREEMENTS),
        }


def make_report(request: Request) -> Report:
    """Counts parameters, simulates memory and extrapolates time. Takes 10 to 30 seconds.

    Raises:
        UserError: at_run_speed is set, but the speed of the run's device is not known.
    """
    config, device, gpus, efficiency = request.config, request.device, request.gpus, request.efficiency
    check_world(gpus, config.tensor_parallel)
    speed = speed_of(request.run, device, efficiency) if request.run else None
    if request.at_run_speed:
        device, efficiency = _calibrated(request, speed)
    time = None
    if request.training_set and device.predicts_time_of(config.model.frozen_dtype):
        time = estimate(config, request.training_set, device, gpus, efficiency, request.price)
    return Report(
        config=config,
        device=device,
        gpus=gpus,
        parameters=count_parameters(config),
        memory=simulate(config, worst_case(config, gpus, request.length), gpus),
        time=time,
        run=request.run,
        run_speed=speed,
    )


def _calibrated(request: Request, speed: RunSpeed | None) -> tuple[Device, float]:
    run = request.run
    if not request.device.predicts_time_of(run.record.config.model.frozen_dtype):
        raise UserError(
            f"{run.path} trained over an fp32 base, but the devices' rates are for bf16. If it ran on this CPU, give "
            "--device here."
        )
    if speed is None or not speed.is_possible:
        raise UserError(
            f"The speed of {run.path} on {request.device.name} is not known. Give the --device that it ran on, or the "
            "--tflops, --bandwidth and --memory of that device."
        )
    return speed.calibrate(request.device)


def _recomputation(config: RunConfig) -> str:
    checkpointing, n_layers = config.training.activation_checkpointing, config.model.llm.n_layers
    if checkpointing is False:
        return "no recomputation"
    layers = recomputed_layers(checkpointing, n_layers)
    return f"{layers} of {n_layers} LLaMA layers" + (" and the ViT" if config.model.has_vit else "") + " recomputed"


def _quoted(row: paper.CostRow) -> Row:
    texts = {"trainable": row.trainable, "memory": row.memory, "time": row.time, "storage": row.storage}
    return Row(row.method, {name: NOTHING if text == "-" else Cell(text, QUOTED) for name, text in texts.items()})


def _exact(count: int) -> Cell:
    return Cell(f"{count:,}", EXACT, count)


def _file(bytes: int) -> Cell:
    return Cell(f"{bytes / 1e6:.1f} MB", EXACT, bytes)


def _gb(bytes: int) -> str:
    return f"{bytes / GB:.1f} GB" if bytes >= GB else f"{bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    if seconds >= 1800:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
