"""Measures how the cost of a training step grows with length, layers, batch and ranks, and where its time goes.

    python benchmarks/scaling.py [--json] [--plot FILE]

The step is one optimizer step through DeepSpeed's engine (ZeRO-2) of a LLaMA of width 512 with a small ViT and adapters
in both, in bf16. The middle point has 4 layers, 4 samples of 256 positions, half of them with an image, and 1 rank. One
quantity grows at a time. Time is that of the fastest of five steps. Memory is that of the simulated step on one rank,
without the weights. A rank is one process with one thread and its own micro-batch, so two ranks do twice the work.

Then the FLOP/s of the middle step, in fp32 and bf16, are compared with this machine's measured matmul rate (1024 x
1024, one thread, best within two seconds). Its time is divided by class of operator (torch.profiler). Reading data is
not included: the micro-batch is made once.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from harness import MALLOC_THAT_KEEPS, restart_with, show

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.profiling.measure import build, in_fresh_processes, measure_seconds, step
from lavin_ds.profiling.simulation import COMPONENTS, simulate
from lavin_ds.profiling.workload import Workload

MIDDLE = Workload(samples=4, length=256, image_fraction=0.5, labelled_fraction=0.7)
LAYERS = 4
GROWING = {
    "length": (64, 128, 256, 512),
    "layers": (2, 4, 8),
    "batch": (1, 2, 4, 8),
    "ranks": (1, 2),
}
# The class of an operator, by a word in its own name or a caller's. The first match counts.
INSIDE = {
    "optimizer": ("Optimizer.step",),
    "attention": ("scaled_dot_product",),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "norms": ("_RMSNorm", "layer_norm"),
    "SwiGLU and GELU": ("_SwiGLU", "_QuickGELU"),
}
MATMULS = ("::mm", "::addmm", "::bmm", "::baddbmm", "convolution")
ADAPTER_SIDE = 18  # columns: two paths of rank 8 and their two weights; every other matrix has at least 64
COPIES = ("copy_", "cat", "clone", "index", "embedding", "fill_", "zero_", "empty")


def config_of(layers: int = LAYERS, dtype: str = "bf16") -> RunConfig:
    return load_recipe(
        "lavin-7b",
        [
            f"model.llm={{dim: 512, n_layers: {layers}, n_heads: 8, ffn_dim: 1376, vocab_size: 8192}}",
            "model.vision={width: 128, layers: 8, heads: 2, patch_size: 14, image_size: 224, readout: {every: 4}}",
            f"model.frozen_dtype={dtype}",
        ],
    )


@dataclass(frozen=True)
class Point:
    """The middle point with one quantity changed to `value`."""

    kind: str
    value: int

    @property
    def ranks(self) -> int:
        return self.value if self.kind == "ranks" else 1

    @property
    def config(self) -> RunConfig:
        config = config_of(self.value if self.kind == "layers" else LAYERS)
        # Every rank has its own micro-batch, so two ranks do twice the work.
        update = {"micro_batch": 8, "global_batch": 8 * self.ranks}
        return config.model_copy(update={"training": config.training.model_copy(update=update)})

    @property
    def workload(self) -> Workload:
        fields = {"length": "length", "batch": "samples"}
        return replace(MIDDLE, **{fields[self.kind]: self.value}) if self.kind in fields else MIDDLE

    def measure(self) -> dict[str, float]:
        """Seconds by phase."""
        return in_fresh_processes(self.ranks, 1, partial(measure_seconds, self.config, self.workload, 5))

    def with_simulation(self, phases: dict[str, float]) -> dict:
        simulated = simulate(self.config, self.workload, gpus=self.ranks)
        kept = [name in ("frozen", "adapters", "optimizer", "zero", "batch") for name in COMPONENTS]
        passing = simulated.timeline[:, ~np.array(kept)].sum(axis=1)
        return {
            "grows": self.kind,
            "value": self.value,
            "seconds": sum(phases.values()),
            "phases": phases,
            "activation_bytes": int(passing.max()),
            "flops": simulated.flops(),
        }


def matmul_rate(dtype: torch.dtype, seconds: float = 2.0, side: int = 1024) -> float:
    """FLOP/s of the fastest of many square matrix products on one thread."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def measure_middle(dtype: str) -> dict:
    """The matmul rate, the seconds of the middle step, and its parts by class of operator. Needs a new process."""
    rate = matmul_rate(torch.float32 if dtype == "fp32" else torch.bfloat16)
    engine, batch = build(config_of(dtype=dtype), MIDDLE)
    seconds = [sum(step(engine, batch).values()) for _ in range(7)][2:]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        began = time.perf_counter()
        step(engine, batch)
        profiled = time.perf_counter() - began
    return {
        "dtype": dtype,
        "matmul_flops_per_second": rate,
        "seconds": min(seconds),
        "parts": parts_of(profiler.events(), profiled),
    }


def with_share(measured: dict) -> dict:
    flops = simulate(config_of(dtype=measured["dtype"]), MIDDLE).flops()
    reached = flops / measured["seconds"] / measured["matmul_flops_per_second"]
    return measured | {"flops": flops, "share": reached}


def parts_of(events, seconds: float) -> dict[str, float]:
    """Fractions of a profiled step's time by class. Operators count without the operators that they call. "between
    operators" is the rest: Python, autograd's bookkeeping, DeepSpeed."""
    parts = Counter()
    for event in events:
        parts[class_of(event)] += event.self_cpu_time_total / 1e6 / seconds
    parts["between operators"] = 1 - sum(value for name, value in parts.items() if name != "between operators")
    return dict(parts.most_common())


def class_of(event) -> str:
    name = event.name
    if not name.startswith("aten::"):
        return "between operators"
    callers = []
    parent = event.cpu_parent
    while parent is not None:
        callers.append(parent.name)
        parent = parent.cpu_parent
    for words, where in INSIDE.items():
        if any(word in caller for word in where for caller in (name, *callers)):
            return words
    if any(word in name for word in MATMULS):
        sides = [side for shape in event.input_shapes for side in shape if len(shape) > 1]
        return "adapters and neck" if sides and min(sides) <= ADAPTER_SIDE else "matmul"
    return "copies and casts" if any(word in name for word in COPIES) else "other elementwise"


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a PNG of the measurements.")] = None,
) -> None:
    """Measure how a step's cost grows, and where its time goes."""
    console = Console(stderr=True)
    every = [Point(kind, value) for kind, values in GROWING.items() for value in values]
    # Measure everything before simulating: a simulation leaves threads, and the measuring processes are forks.
    seconds, middles = [], []
    for point in every:
        with console.status(f"{point.kind} {point.value}"):
            seconds.append(point.measure())
    for dtype in ("fp32", "bf16"):
        with console.status(f"share of the matmul rate, {dtype}"):
            middles.append(in_fresh_processes(1, 1, partial(measure_middle, dtype)))
    with console.status("memory and FLOPs"):
        points = [point.with_simulation(phases) for point, phases in zip(every, seconds, strict=True)]
        peaks = [with_share(measured) for measured in middles]
    if plot_file:
        plot(points, peaks, plot_file)
    show({"points": points, "peaks": peaks}, as_json, points_table(points), peaks_table(peaks))


def middle(kind: str) -> int:
    return {"length": MIDDLE.length, "layers": LAYERS, "batch": MIDDLE.samples, "ranks": 1}[kind]


def points_table(points: list[dict]) -> Table:
    table = Table(title="One quantity grows at a time; ratios are relative to the row with 1.00", title_justify="left")
    for column in ("", "", "seconds", "ratio", "activations", "ratio", "GFLOP/s"):
        table.add_column(column, justify="right")
    for kind in GROWING:
        table.add_section()
        base = next(p for p in points if p["grows"] == kind and p["value"] == middle(kind))
        for p in (p for p in points if p["grows"] == kind):
            table.add_row(
                kind,
                str(p["value"]),
                f"{p['seconds']:.3f}",
                f"{p['seconds'] / base['seconds']:.2f}",
                f"{p['activation_bytes'] / 1e6:.0f} MB",
                f"{p['activation_bytes'] / base['activation_bytes']:.2f}",
                f"{p['flops'] * (p['value'] if kind == 'ranks' else 1) / p['seconds'] / 1e9:.0f}",
            )
    return table


def peaks_table(peaks: list[dict]) -> Table:
    table = Table(title="The middle step against this machine's matmul rate, one thread", title_justify="left")
    table.add_column("")
    for peak in peaks:
        table.add_column(peak["dtype"], justify="right")
    table.add_row("matmul rate, GFLOP/s", *(f"{p['matmul_flops_per_second'] / 1e9:.0f}" for p in peaks))
    table.add_row("the step, GFLOP/s", *(f"{p['flops'] / p['seconds'] / 1e9:.0f}" for p in peaks))
    table.add_row("share reached", *(f"{p['share']:.0%}" for p in peaks))
    table.add_section()
    for name in dict.fromkeys(name for peak in peaks for name in peak["parts"]):
        table.add_row(f"time: {name}", *(f"{p['parts'].get(name, 0):.1%}" for p in peaks))
    return table


def plot(points: list[dict], peaks: list[dict], path: Path) -> None:
    """Plots time and memory over each quantity, and the time of a step by class."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    *axes, bars = figure.subplots(1, len(GROWING) + 1, width_ratios=[1] * len(GROWING) + [1.4])
    for kind, ax in zip(GROWING, axes, strict=True):
        mine = [p for p in points if p["grows"] == kind]
        values = [p["value"] for p in mine]
        ax.plot(values, [p["seconds"] for p in mine], "o-", color="C0", label="seconds")
        ax.set(ylim=(0, None), xticks=values, title=kind)
        ax.tick_params(axis="x", rotation=45)
        memory = ax.twinx()
        memory.plot(values, [p["activation_bytes"] / 1e6 for p in mine], "s--", color="C1", label="MB")
        memory.set_ylim(0, None)
        ax.tick_params(axis="y", colors="C0")
        memory.tick_params(axis="y", colors="C1")
    axes[0].set_ylabel("seconds of a step", color="C0")
    axes[-1].text(0.1, 0.1, "dashed: MB of\nactivations", color="C1", transform=axes[-1].transAxes, fontsize=8)
    left = [0.0] * len(peaks)
    for number, name in enumerate(dict.fromkeys(name for peak in peaks for name in peak["parts"])):
        widths = [peak["parts"].get(name, 0) for peak in peaks]
        bars.bar([p["dtype"] for p in peaks], widths, bottom=left, label=name, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bars.set_title("time of a step by class")
    bars.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    restart_with(MALLOC_THAT_KEEPS)
    typer.run(main)
