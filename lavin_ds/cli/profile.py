"""`lavin-ds profile`: what a recipe costs, known before the first GPU hour."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lavin_ds.cli import console
from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.errors import UserError
from lavin_ds.run import RunRecord, load_run

if TYPE_CHECKING:  # they import torch, which --help need not wait for
    from lavin_ds.profiling.params import ParameterCount
    from lavin_ds.profiling.report import Report

MARK_STYLES = {"quoted": "dim", "exact": "green", "simulated": "cyan", "extrapolated": "yellow", "measured": "bold"}
HEADINGS = {"trainable": "#T-Params", "memory": "Memory", "time": "Time", "storage": "#Storage"}


class OverridesGroup(TyperGroup):
    """Lets `key=value` stand bare beside a subcommand, which a group cannot take as arguments itself."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        takes_value = {o for p in self.params if not getattr(p, "is_flag", False) for o in p.opts}
        written, previous = [], ""
        for position, arg in enumerate(args):
            if arg in self.commands and previous not in takes_value:
                return super().parse_args(ctx, written + args[position:])
            is_override = re.match(r"[A-Za-z_][\w.]*=", arg) and previous not in takes_value
            written += ["--set", arg] if is_override else [arg]
            previous = arg
        return super().parse_args(ctx, written)


app = typer.Typer(
    help="What a recipe costs: parameters, memory, time and storage, beside the papers' figures. "
    "Changes to the recipe may follow as key=value.",
    cls=OverridesGroup,
    invoke_without_command=True,
)

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def profile(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe's name, or a YAML file.")] = None,
    run: Annotated[Path | None, typer.Option(help="A finished run: its recipe, and what it measured.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; default 8, or the run's ranks.")] = None,
    device: Annotated[
        str, typer.Option(help="GPU: a100-40g a100-80g h100-80g h200 l4 rtx-3090 rtx-4090.")
    ] = "a100-80g",
    data: Annotated[Path | None, typer.Option(help="Shards whose lengths to use; default: ScienceQA's.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples; default: the recipe's.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Positions that memory is for; default: max.")] = None,
    efficiency: Annotated[float, typer.Option(help="Assumed share of the device's peak rates.")] = 0.4,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the memory by component.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    if ctx.invoked_subcommand:
        return
    from lavin_ds.profiling.memory import measured
    from lavin_ds.profiling.report import make_report, plot_memory
    from lavin_ds.profiling.time import device_named, from_shards, scienceqa

    record = load_run(run) if run else None
    config = _config(recipe, record, overrides or [], micro_batch)
    chosen = device_named(device)
    finished = measured(run) if run else None
    visual_tokens = config.model.visual_tokens
    if record and not data and record.inputs.data.is_dir():
        data = record.inputs.data
    training_set = from_shards(data, visual_tokens) if data else scienceqa(config.data.max_length)
    gpus = gpus or (record.ranks if record else 8)
    with console.err.status("simulating a training step"):
        report = make_report(config, chosen, gpus, training_set, efficiency, length, finished, run)
    if plot:
        plot_memory(report, plot)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    _print(report)
    if plot:
        console.err.print(f"wrote {plot}", highlight=False)


@app.command()
def params(
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count a recipe's parameters, exactly and without loading anything."""
    from lavin_ds.profiling.params import count_parameters

    count = count_parameters(load_recipe(recipe, overrides or []))
    if as_json:
        print(json.dumps({"recipe": recipe} | count.as_dict(), indent=2))
    else:
        console.out.print(_parameter_table(recipe, count))


def _config(recipe: str | None, record: RunRecord | None, overrides: list[str], micro_batch: int | None) -> RunConfig:
    if (recipe is None) == (record is None):
        raise UserError("Give either --recipe NAME or --run RUN.")
    if record and (overrides or micro_batch):
        raise UserError("A finished run's recipe cannot be changed: use --recipe with changes instead of --run.")
    if record:
        return record.config
    if micro_batch:
        overrides = [*overrides, f"training.micro_batch={micro_batch}"]
    return load_recipe(recipe, overrides)


def show_run(run: Path) -> None:
    """Prints the cost table of a finished run, as `lavin-ds profile --run` heads its report, to stderr."""
    from lavin_ds.profiling.memory import measured
    from lavin_ds.profiling.report import make_report
    from lavin_ds.profiling.time import device_named, from_shards

    record = load_run(run)
    training_set = from_shards(record.inputs.data, record.config.model.visual_tokens)
    report = make_report(
        record.config, device_named("a100-80g"), record.ranks, training_set, 0.4, None, measured(run), run
    )
    console.err.print(_cost_table(report))
    console.err.print(_legend(report), highlight=False)


def _print(report: Report) -> None:
    console.out.print(_cost_table(report))
    console.out.print(_legend(report), highlight=False)
    console.out.print()
    console.out.print(_memory_table(report))
    console.out.print()
    console.out.print(_parameter_table(report.config.name, report.parameters))
    console.out.print()
    for note in report.notes():
        console.out.print(note, highlight=False)


def _cost_table(report: Report) -> Table:
    where = f"quoted: 8 x A100, lite one GPU; here: {report.gpus} x {report.device.name}"
    table = Table(title=f"Cost of training ({where})", title_justify="left")
    table.add_column("Method", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    rows = report.rows()
    for position, row in enumerate(rows):
        texts = [Text(cell.text, style=MARK_STYLES.get(cell.mark, "")) for cell in row.cells.values()]
        for text, cell in zip(texts, row.cells.values(), strict=True):
            text.append(f" {cell.mark[:1]}" if cell.mark and cell.mark != "extrapolated" else "")
            text.append(" x" if cell.mark == "extrapolated" else "")
        following = rows[position + 1].method if position + 1 < len(rows) else ""
        table.add_row(row.method, *texts, end_section=following.endswith("(here)"))
    return table


def _legend(report: Report) -> Text:
    from lavin_ds.profiling.report import LEGEND

    used = {cell.mark for row in report.rows() for cell in row.cells.values()}
    legend = Text()
    for mark in (m for m in LEGEND if m in used):
        letter = "x" if mark == "extrapolated" else mark[:1]
        legend.append(f"{letter} {mark}", style=MARK_STYLES[mark]).append(f": {LEGEND[mark]}\n")
    return legend


def _memory_table(report: Report) -> Table:
    from lavin_ds.profiling.memory import COMPONENTS

    memory = report.memory
    unit, size = ("GB", 1e9) if memory.peak_bytes >= 1e9 else ("MB", 1e6)
    title = f"Memory of one rank at its peak: {memory.peak_bytes / size:.2f} {unit}"
    table = Table(title=title, title_justify="left")
    table.add_column("Component", no_wrap=True)
    table.add_column(unit, justify="right")
    table.add_column("Share", justify="right")
    table.add_column("What", style="dim")
    for name, bytes in memory.components.items():
        table.add_row(name, f"{bytes / size:.3f}", f"{bytes / memory.peak_bytes:.1%}", COMPONENTS[name])
    return table


def _parameter_table(name: str, count: ParameterCount) -> Table:
    table = Table(title=f"Parameters of {name}", title_justify="left")
    table.add_column("Component", no_wrap=True)
    table.add_column("Parameters", justify="right")
    table.add_column("On disk", justify="right")
    for component, number in count.components.items():
        table.add_row(component.replace("_", " "), f"{number:,}", "")
    adapter = f"{count.adapter_file_bytes / 1e6:.1f} MB"
    table.add_row("trainable", f"{count.trainable:,}", adapter, style="bold", end_section=True)
    for part, number in count.frozen.items():
        table.add_row(f"frozen {part}", f"{number:,}", f"{count.frozen_bytes[part] / 1e6:,.0f} MB in memory")
    table.add_row("checkpoint to resume from", "", f"{count.checkpoint_bytes / 1e6:.1f} MB")
    return table
