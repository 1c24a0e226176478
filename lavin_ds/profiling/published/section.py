"""The HTML report's section on the authors' step: a table and a picture of what each saving removes."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure

from lavin_ds.devices import GB
from lavin_ds.profiling.html_report import picture, table, table_row
from lavin_ds.profiling.plots import unit_of
from lavin_ds.profiling.published.savings import AsPublished


def html_section(published: AsPublished, name: str) -> str:
    title = f"{name}: from the authors' way to ours"
    drawn = picture("memory after each saving", lambda to: plot_savings(published, title, to))
    return "\n".join(["<h2>Against the authors' way</h2>", _stages(published), drawn])


def _stages(published: AsPublished) -> str:
    rows = [
        table_row(
            [
                escape(stage.name),
                f"{stage.full_bytes / GB:.2f}",
                f"{stage.average_bytes / GB:.2f}",
                f"{stage.average_flops / 1e12:.1f}",
            ]
        )
        for stage in published.stages
    ]
    headings = ["Savings, one added at a time", "full micro-batch, GB", "average micro-batch, GB", "average, TFLOP"]
    return table("Tensors at the peak of a step, simulated", headings, rows)


def plot_savings(published: AsPublished, title: str, to: Path | BinaryIO) -> None:
    """A bar chart of the peak after each saving, for a full and for an average micro-batch."""
    stages = published.stages
    unit, size = unit_of(stages[0].full_bytes)
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(stages))
    for offset, key, label, colour in (
        (-0.2, "full_bytes", "full micro-batch", "C0"),
        (0.2, "average_bytes", "average micro-batch", "C1"),
    ):
        values = np.array([getattr(stage, key) for stage in stages]) / size
        axes.barh(rows + offset, values, height=0.38, color=colour, label=label)
        for row, value in zip(rows, values, strict=True):
            change = f" ({value - values[row - 1]:+.1f})" if row and abs(value - values[row - 1]) >= 0.05 else ""
            axes.text(value, row + offset, f" {value:.1f}{change}", va="center", fontsize=8)
    axes.set_yticks(rows, [stage.name for stage in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, max(s.full_bytes for s in stages) / size * 1.18)
    axes.set_xlabel(f"{unit} on one GPU at the peak, tensors only (simulated)")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(to, dpi=150)
