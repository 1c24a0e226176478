"""Compares the cost model with real steps on this CPU: memory within a few percent, time within a few tens of percent.

    python benchmarks/cost_model.py memory --out DIR     # measures memory: about 7 minutes on two quiet cores
    python benchmarks/cost_model.py seconds --out DIR    # measures time: about 4 minutes
    python benchmarks/cost_model.py compare --out DIR [--json]

30 configurations are compared. 5 others give the rates that turn operators into seconds (profiling/calibration.py). The
configurations differ in width, depth, length, batch, activation checkpointing, ZeRO stage, ranks, tensor parallelism,
dtype and vision. Every measurement is a training step of the DeepSpeed engine, in processes of one thread each.

Memory: the simulated bytes of the whole step (weights, moments, buffers, activations) are compared with what torch's
allocator reports to its profiler, inside and outside operators. They are also compared with the kernel's count of the
process's pages, which includes what MKL and oneDNN allocate and is rounded up to pages. "Beyond weights" subtracts the
frozen weights from both sides, because they are easy to predict.

The exit code is 1 if the median error of memory is over 5% or its worst over 15%, or if the median of time is over 15%.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from harness import MALLOC_THAT_KEEPS, MALLOC_THAT_RETURNS, restart_with

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.files import write_json

MEMORY_MEDIAN, MEMORY_WORST, TIME_MEDIAN = 0.05, 0.15, 0.15

# Width, layers, heads, feed-forward width. The vocabulary has 8,192 entries unless a case says otherwise.
SIZES = {"S": (256, 4, 4, 704), "M": (384, 6, 6, 1024), "L": (512, 8, 8, 1408), "XL": (768, 6, 12, 2048)}
VISION = "{width: 256, layers: 4, heads: 4, patch_size: 16, image_size: 128, readout: {every: 2}}"
# ZeRO-3 settings that make a difference at these sizes: prefetching, and releases between forward and backward.
ZERO3 = {
    "zero3-none": {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    "zero3-some": {"stage3_prefetch_bucket_size": 2_000_000, "stage3_max_reuse_distance": 1_000_000},
    "zero3-all": {},
}


@dataclass(frozen=True)
class Case:
    size: str
    samples: int
    length: int
    dtype: str = "fp32"
    zero: str = "zero0"
    ranks: int = 1
    tensor_parallel: int = 1
    checkpointing: bool = False
    images: float = 0.0  # share of samples with an image; 0: no vision at all
    vocabulary: int = 8192
    labelled: float = 0.7
    packing: bool = True  # as in lavin-7b

    @property
    def name(self) -> str:
        parts = [f"{self.size} {self.samples}x{self.length} {self.dtype}", self.zero if self.zero != "zero0" else ""]
        parts += [f"{self.ranks} ranks" if self.ranks > 1 else "", "TP 2" if self.tensor_parallel > 1 else ""]
        parts += ["ckpt" if self.checkpointing else "", f"{self.images:.0%} images" if self.images else ""]
        parts += [f"V {self.vocabulary}" if self.vocabulary != 8192 else "", "padded" if not self.packing else ""]
        return ", ".join(part for part in parts if part)

    def config(self, folder: Path) -> RunConfig:
        dim, layers, heads, ffn = SIZES[self.size]
        replicas = self.ranks // self.tensor_parallel
        zero = self.zero
        if zero in ZERO3:
            path = folder / f"{zero}.json"
            stage = {"stage": 3, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 10_000}
            write_json(path, {"zero_optimization": stage | ZERO3[zero], "steps_per_print": 10**9})
            zero = str(path)
        llm = f"{{dim: {dim}, n_layers: {layers}, n_heads: {heads}, ffn_dim: {ffn}, vocab_size: {self.vocabulary}}}"
        return load_recipe(
            "lavin-7b",
            [
                f"model.llm={llm}",
                f"model.vision={VISION if self.images else 'null'}",
                f"model.frozen_dtype={self.dtype}",
                f"deepspeed={zero}",
                f"tensor_parallel={self.tensor_parallel}",
                f"training.activation_checkpointing={str(self.checkpointing).lower()}",
                f"training.packing={str(self.packing).lower()}",
                f"training.micro_batch={self.samples}",
                f"training.global_batch={self.samples * replicas}",
            ],
        )


CASES = (
    Case("S", 8, 128),
    Case("S", 8, 256, packing=False),
    Case("S", 4, 512),
    Case("S", 16, 128, "bf16", packing=False),
    Case("S", 8, 256, "bf16", checkpointing=True),
    Case("S", 8, 256, "fp32", "zero2", images=0.5),
    Case("S", 8, 128, "fp32", "zero1", images=1.0),
    Case("S", 8, 128, "bf16", vocabulary=32000, packing=False),
    Case("S", 4, 512, "bf16", labelled=0.2),
    Case("S", 8, 128, "fp32", "zero3-none", 2),
    Case("M", 4, 128),
    Case("M", 4, 256, "fp32", "zero1", packing=False),
    Case("M", 2, 512, "bf16"),
    Case("M", 8, 128, "bf16", "zero2", images=0.5),
    Case("M", 4, 256, "fp32", checkpointing=True, packing=False),
    Case("M", 4, 256, "bf16", "zero3-some"),
    Case("M", 4, 128, "fp32", "zero1", 2),
    Case("M", 4, 128, "bf16", "zero3-some", 2, packing=False),
    Case("M", 4, 256, "bf16", "zero3-none", 2, checkpointing=True),
    Case("M", 4, 256, "fp32", "zero0", 2, 2),
    Case("L", 1, 512),
    Case("L", 4, 128, images=0.5, packing=False),
    Case("L", 2, 256, "fp32", "zero2", checkpointing=True),
    Case("L", 4, 256, "bf16", packing=False),
    Case("L", 2, 256, "bf16", "zero1", 2, 2),
    Case("L", 2, 128, "fp32", "zero2", 2, packing=False),
    Case("L", 4, 128, "bf16", "zero3-all", 2),
    Case("XL", 2, 128, packing=False),
    Case("XL", 2, 256, "bf16", checkpointing=True, images=1.0),
    Case("XL", 4, 128, "bf16", labelled=1.0),
)
CALIBRATION = (
    Case("S", 4, 256, packing=False),
    Case("M", 4, 256, "bf16", images=0.5),
    Case("L", 2, 256),
    Case("XL", 2, 128, "bf16", packing=False),
    Case("M", 4, 128, "bf16", "zero2", 2, 2),
)

app = typer.Typer(add_completion=False)
console = Console(stderr=True)
Out = Annotated[Path, typer.Option(help="Folder for the measurements, the table and the PNG.")]
Only = Annotated[int | None, typer.Option(help="Measure only the first N configurations, to try the script.")]


@app.command()
def memory(out: Out, only: Only = None) -> None:
    """Measures the memory of every configuration. Continues where it was stopped."""
    from memory_use import measure_allocated, measure_resident

    restart_with(MALLOC_THAT_RETURNS)
    kinds = {"allocated": measure_allocated, "resident": measure_resident}
    _measure(out / "memory.json", CASES[:only], lambda run: {name: run(work) for name, work in kinds.items()})


@app.command()
def seconds(out: Out, only: Only = None) -> None:
    """Measures the step time of every configuration, and of those for calibration. Continues where it was stopped."""
    from lavin_ds.profiling.measure import measure_seconds

    restart_with(MALLOC_THAT_KEEPS)
    _measure(out / "seconds.json", (*CALIBRATION, *CASES[:only]), lambda run: run(measure_seconds))


def _measure(path: Path, cases: tuple[Case, ...], measure: Callable[[Callable], dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if case.name not in results:
                began = time.perf_counter()
                results[case.name] = measure(partial(_in_processes, case, Path(folder)))
                write_json(path, results)
                console.print(f"{time.perf_counter() - began:5.1f} s  {case.name}", highlight=False)


def _in_processes(case: Case, folder: Path, work: Callable) -> Any:
    from lavin_ds.profiling.measure import in_fresh_processes

    return in_fresh_processes(case.ranks, case.tensor_parallel, partial(work, case.config(folder), _workload(case)))


def _workload(case: Case):
    from lavin_ds.profiling.workload import Workload

    return Workload(case.samples, case.length, case.images, case.labelled)


@app.command()
def compare(out: Out, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Simulates every measured configuration and compares it with the measurements."""
    from lavin_ds.profiling.calibration import fit_rates, seconds_at
    from lavin_ds.profiling.simulation import simulate

    measured = {kind: json.loads((out / f"{kind}.json").read_text()) for kind in ("memory", "seconds")}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        simulations = {
            case.name: simulate(case.config(Path(folder)), _workload(case), case.ranks)
            for case in (*CALIBRATION, *CASES)
            if case.name in measured["seconds"]
        }
    took = time.perf_counter() - began
    rates = fit_rates([(simulations[c.name], measured["seconds"][c.name]) for c in CALIBRATION])
    rows = []
    for case in CASES:
        if case.name not in measured["memory"]:
            continue
        simulation, held = simulations[case.name], measured["memory"][case.name]
        weights = simulation.components["frozen"]
        expected, real = simulation.peak_bytes, held["allocated"]
        predicted = seconds_at(rates, simulation.operations)
        taken = sum(measured["seconds"][case.name].values())
        rows.append(
            {
                "case": case.name,
                "simulated": expected,
                "allocated": real,
                "resident": held["resident"],
                "memory_error": expected / real - 1,
                "beyond_weights_error": (expected - weights) / (real - weights) - 1,
                "resident_error": expected / held["resident"] - 1,
                "predicted_seconds": predicted,
                "seconds": taken,
                "time_error": predicted / taken - 1,
            }
        )
    summary = {key: _summary(rows, key) for key in rows[0] if key.endswith("_error")}
    good = summary["memory_error"]["median"] <= MEMORY_MEDIAN and summary["memory_error"]["worst"] <= MEMORY_WORST
    good = good and summary["time_error"]["median"] <= TIME_MEDIAN
    result = {"rates": rates.as_dict(), "summary": summary, "simulation_seconds": took, "rows": rows}
    write_json(out / "cost_model.json", result)
    plot(rows, summary, out / "cost_model.png")
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(rows, summary, rates)
    raise typer.Exit(0 if good else 1)


def _summary(rows: list[dict], key: str) -> dict[str, float]:
    errors = [abs(row[key]) for row in rows]
    return {"median": median(errors), "worst": max(errors)}


def _print(rows: list[dict], summary: dict, rates) -> None:
    table = Table(title=f"Simulated against measured, {len(rows)} configurations", title_justify="left", box=SIMPLE)
    table.add_column("Configuration")
    for heading in ("MB", "error", "beyond\nweights", "s", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['allocated'] / 1e6:.1f}",
            *(f"{row[key]:+.1%}" for key in ("memory_error", "beyond_weights_error")),
            f"{row['seconds']:.2f}",
            f"{row['time_error']:+.0%}",
        )
    output = Console()
    output.print(table)
    for key, name in (
        ("memory_error", "memory"),
        ("beyond_weights_error", "memory beyond weights"),
        ("resident_error", "memory against resident pages"),
        ("time_error", "time"),
    ):
        output.print(f"{name}: median error {summary[key]['median']:.1%}, worst {summary[key]['worst']:.1%}")
    speeds = [f"{1e-9 / x:.0f} GFLOP/s {n}" for x, n in ((rates.flop, "fp32"), (rates.half_flop, "bf16")) if x]
    output.print(
        f"rates: {', '.join(speeds)}, {1e-9 / rates.byte:.1f} GB/s, {rates.operator * 1e6:.0f} us per operator"
    )


def plot(rows: list[dict], summary: dict, path: Path) -> None:
    """Simulated against measured, one panel for memory and one for time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for axes, (x, y, unit, error, scale) in zip(
        figure.subplots(1, 2),
        (
            ("allocated", "simulated", "MB", "memory_error", 1e6),
            ("seconds", "predicted_seconds", "s", "time_error", 1),
        ),
        strict=True,
    ):
        for label, chosen, marker in (
            ("1 rank", lambda case: "ranks" not in case, "o"),
            ("2 data-parallel ranks", lambda case: "ranks" in case and "TP" not in case, "^"),
            ("2 tensor-parallel ranks", lambda case: "TP" in case, "s"),
        ):
            points = [row for row in rows if chosen(row["case"])]
            axes.loglog([p[x] / scale for p in points], [p[y] / scale for p in points], marker, alpha=0.7, label=label)
        low, high = axes.get_xlim()
        for bound, style in ((0.85, ":"), (1.0, "-"), (1.15, ":")):
            axes.loglog([low, high], [bound * low, bound * high], "k" + style, linewidth=0.8, zorder=0)
        axes.set_xlabel(f"measured, {unit}")
        axes.set_ylabel(f"{'simulated' if scale > 1 else 'predicted'}, {unit}")
        axes.set_title(
            f"{'Memory' if scale > 1 else 'Time'} of a step: median error {summary[error]['median']:.1%}, "
            f"worst {summary[error]['worst']:.1%}",
            loc="left",
            fontsize=10,
        )
    axes.legend(frameon=False, title="dotted: 15% off", loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app()
