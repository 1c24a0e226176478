"""Pictures of the cost report: memory at the peak of each phase, and memory over a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from matplotlib.figure import Figure

from lavin_ds.devices import GB
from lavin_ds.profiling.simulation import COMPONENTS, PHASES, Simulation

if TYPE_CHECKING:
    from lavin_ds.profiling.report import Report

COLOURS = dict(zip(COMPONENTS, [f"C{n}" for n in range(len(COMPONENTS))], strict=True))
VISIBLE = 0.002  # share of the largest; a smaller bar or band is thinner than a line
POINTS = 800  # of the timeline; each shows the highest of several allocations


def unit_of(bytes: float) -> tuple[str, float]:
    return ("GB", GB) if bytes >= GB else ("MB", 1e6)


def plot_memory(report: Report, to: Path | BinaryIO) -> None:
    """Each phase's peak as a bar stacked by component, with lines at the device's memory and the papers' figure."""
    simulation = report.memory
    unit, size = unit_of(simulation.peak_bytes)
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    phases = list(simulation.phases)
    left = np.zeros(len(phases))
    largest = max(max(held.values()) for held in simulation.phases.values())
    for name in COMPONENTS:
        widths = np.array([simulation.phases[phase][name] for phase in phases]) / size
        if widths.max() * size > largest * VISIBLE:
            axes.barh(phases, widths, left=left, label=name, color=COLOURS[name])
        left += widths
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}", va="center")
    axes.margins(x=0.12)  # room for the totals beside the bars
    if size == GB:
        axes.axvline(report.device.memory, color="black", linestyle="--", linewidth=1, label=report.device.name)
        if report.published_memory:
            axes.axvline(report.published_memory, color="black", linestyle=":", linewidth=1, label="paper")
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} on one rank (simulated)")
    axes.set_title(f"{report.config.name}: peak of each phase of a step", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(to, dpi=150)


def plot_timeline(simulation: Simulation, title: str, to: Path | BinaryIO) -> None:
    """One rank's memory by component, after each allocation of one step."""
    moments, phases = simulation.timeline, simulation.timeline_phases
    moments, phases = moments[phases < PHASES.index("end")], phases[phases < PHASES.index("end")]
    bins = np.array_split(np.arange(len(moments)), min(POINTS, len(moments)))
    shown = np.array([part[moments[part].sum(axis=1).argmax()] for part in bins])
    unit, size = unit_of(simulation.peak_bytes)
    held = moments[shown].T / size
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    visible = [n for n in range(len(COMPONENTS)) if held[n].max() * size > simulation.peak_bytes * VISIBLE]
    names = [list(COMPONENTS)[n] for n in visible]
    axes.stackplot(shown, held[visible], labels=names, colors=[COLOURS[name] for name in names], step="pre")
    top = held.sum(axis=0).max() * 1.12
    for number, phase in enumerate(PHASES[:3]):
        inside = np.flatnonzero(phases == number)
        if len(inside):
            axes.axvline(inside[0], color="black", linewidth=0.8)
            axes.text(inside[0], top, f" {phase}", va="top", fontsize=9)
    peak = shown[held.sum(axis=0).argmax()]
    axes.plot(peak, held.sum(axis=0).max(), "kv", markersize=5)
    axes.set_ylim(0, top)
    axes.set_xlim(0, len(moments))
    axes.set_xlabel("allocations of one step, in order")
    axes.set_ylabel(f"{unit} on one rank (simulated)")
    axes.set_title(title, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(to, dpi=150)
