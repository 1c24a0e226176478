"""`lavin-ds profile`: what a recipe costs, known before the first GPU hour."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lavin_ds.cli import console
from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.schema import check_manifest, load_manifest
from lavin_ds.devices import DEVICES
from lavin_ds.errors import UserError
from lavin_ds.run import RunRecord, load_run

if TYPE_CHECKING:  # they import torch, which --help need not wait for
    from lavin_ds.models.counting import ParameterCount
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


EFFICIENCY = 0.4  # assumed, not measured
DEFAULT_DEVICE = "a100-80g"

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
    run: Annotated[
        Path | None,
        typer.Option(help="A finished run, beside its prediction; with --recipe or --gpus: those at its speed."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; default 8, here 1, or the run's ranks.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help=f"GPU: {' '.join(DEVICES)}; here: this CPU. Default: a100-80g."),
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="Of a device of your own, with the next two.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its memory's, GB a second.")] = None,
    memory: Annotated[float | None, typer.Option(help="Its size, GB.")] = None,
    link: Annotated[float | None, typer.Option(help="GB/s that a GPU sends; several nodes: their network's.")] = None,
    data: Annotated[Path | None, typer.Option(help="Shards whose lengths to use; default: ScienceQA's.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples; default: the recipe's.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Positions that memory is for; default: max.")] = None,
    efficiency: Annotated[float, typer.Option(help="Assumed share of the device's peak rates.")] = EFFICIENCY,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for one hour.")] = None,
    as_published: Annotated[bool, typer.Option(help="The authors' way too, and what each saving takes off.")] = False,
    fit: Annotated[str | None, typer.Option(help="The fastest setting for a card of 24GiB, and its command.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the memory by component.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Write a PNG of the memory over a step.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    if ctx.invoked_subcommand:
        return
    from lavin_ds.devices import parse_bytes

    files = {"--plot": plot, "--timeline": timeline, "--html": html}
    if fit:
        given = {
            "--run": run,
            "--micro-batch": micro_batch,
            "--length": length,
            "--as-published": as_published,
            **files,
        }
        if unused := [option for option, value in given.items() if value]:
            raise UserError(f"--fit searches a recipe and prints a command: it has no use for {', '.join(unused)}.")
    _check_files(files)
    record = load_run(run) if run else None
    config = _config(recipe, record, overrides or [], micro_batch)
    training_set = _training_set(config, record, data)
    if training_set is None and (fit or as_published):
        raise UserError(
            f"How long samples of {config.data.prompt_format} data are is not known without shards: give --data SHARDS."
        )
    gpus = gpus or (record.ranks if record else 1 if device == "here" else 8)
    chosen = _device(device, (tflops, bandwidth, memory), link, gpus)
    if fit:
        assumed = device is None and tflops is None
        limit, overrides = parse_bytes(fit), overrides or []
        _fit(config, recipe, limit, chosen, gpus, training_set, efficiency, price, overrides, assumed, as_json)
        return
    at_its_speed = record is not None and (recipe is not None or gpus != record.ranks)
    shown = {"length": length, "price": price, "with_published": as_published}
    report = _report(config, record, run, chosen, gpus, training_set, efficiency, at_its_speed, **shown)
    written = _write_files(report, plot, timeline, html)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    _print(report)
    for path in written:
        console.err.print(f"wrote {path}", highlight=False)


def show_run(run: Path) -> None:
    """Prints the cost table of a finished run, as `lavin-ds profile --run` heads its report, to stderr."""
    record = load_run(run)
    device, training_set = _device(), _training_set(record.config, record, None)
    report = _report(record.config, record, run, device, record.ranks, training_set)
    console.err.print(_cost_table(report))
    console.err.print(_legend(report), highlight=False)


def _report(
    config, record, run, device, gpus, training_set, efficiency=EFFICIENCY, at_its_speed=False, **shown
) -> Report:
    """at_its_speed: the recipe is not the run's, or on other ranks, and is predicted as fast as the run was."""
    from lavin_ds.profiling.memory import measured
    from lavin_ds.profiling.report import make_report

    finished = measured(run) if record else None
    speed = _reached(record, run, device, finished, efficiency) if record else None
    with console.err.status("simulating a training step"):
        if at_its_speed:
            if not device.predicts_time_of(record.config.model.frozen_dtype):
                raise UserError(
                    f"The base of {run} is fp32, and the devices' rates are for bf16: give --device here, if it ran on "
                    "this CPU."
                )
            if speed is None or not speed.is_possible:
                raise UserError(
                    f"{run} cannot tell how fast another recipe or number of GPUs is: it needs the --device that it "
                    "ran on, or --tflops, --bandwidth and --memory of it."
                )
            device, efficiency = speed.calibrate(device)
        return make_report(
            config, device, gpus, training_set, efficiency, measured=finished, run=run, reached=speed, **shown
        )


def _reached(record: RunRecord, run: Path, device, finished, efficiency: float):
    """How fast the run was on `device`; None where it was on another, or the base is fp32 and the rates are not."""
    from lavin_ds.profiling.reached import ran_on, reached
    from lavin_ds.profiling.time import estimate

    if not ran_on(device, finished.peak_device_bytes is not None):
        return None
    if not device.predicts_time_of(record.config.model.frozen_dtype):
        return None
    training_set = _training_set(record.config, record, None)
    if training_set is None:
        return None
    return reached(run, estimate(record.config, training_set, device, record.ranks, efficiency))


def _device(name: str | None = None, figures=(None, None, None), link: float | None = None, gpus: int = 1):
    from lavin_ds.devices import custom_device
    from lavin_ds.profiling.calibrate import HERE, device_named

    given = [figure for figure in figures if figure is not None]
    if given and (len(given) < len(figures) or name):
        raise UserError("A device of your own needs all of --tflops, --bandwidth and --memory, and no --device.")
    if any(figure <= 0 for figure in (*given, *([] if link is None else [link]))):
        raise UserError("--tflops, --bandwidth, --memory and --link must be above 0.")
    if name == HERE:
        console.err.print("measuring a few training steps of small models on this CPU", highlight=False)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
    device = custom_device(*given) if given else device_named(name or DEFAULT_DEVICE, gpus)
    return replace(device, link=link) if link else device


def _training_set(config: RunConfig, record: RunRecord | None, data: Path | None):
    """The shards given, the run's own where they suit, or ScienceQA's lengths; None where those say nothing."""
    from lavin_ds.profiling.time import from_shards, scienceqa

    if data:
        if wrong := check_manifest(load_manifest(data), config):
            raise UserError(f"The shards in {data} are not for {config.name}: {'; '.join(wrong)}.")
    elif record and record.inputs.data.is_dir() and not check_manifest(load_manifest(record.inputs.data), config):
        data = record.inputs.data
    if data:
        return from_shards(data, config.model.visual_tokens)
    return scienceqa(config.data.max_length) if config.data.prompt_format.startswith("QCM") else None


def _check_files(files: dict[str, Path | None]) -> None:
    """Before minutes go into what is to be written to them."""
    for option, path in files.items():
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}.")
        if option != "--html" and path.suffix.lower() != ".png":
            raise UserError(f"{option} {path}: it writes PNG: give a name that ends with .png.")


def _write_files(report: Report, plot: Path | None, timeline: Path | None, html: Path | None) -> list[Path]:
    from lavin_ds.files import write_atomically
    from lavin_ds.profiling.html import html_report
    from lavin_ds.profiling.plots import plot_memory, plot_timeline

    title = f"{report.config.name}: memory over one step"
    if plot:
        plot_memory(report, plot)
    if timeline:
        plot_timeline(report.memory, title, timeline)
    if html:
        text = html_report(report)
        write_atomically(html, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [path for path in (plot, timeline, html) if path]


def _fit(config, recipe, limit, device, gpus, training_set, efficiency, price, overrides, assumed, as_json) -> None:
    """assumed: nobody said which device the card is."""
    from lavin_ds.profiling.fit import find_fit
    from lavin_ds.profiling.report import duration

    with console.err.status("trying settings") as status:
        found = find_fit(config, limit, device, gpus, training_set, efficiency, status.update)
    command = found.command(recipe, gpus, overrides)
    if as_json:
        print(json.dumps(found.as_dict() | {"command": command}, indent=2))
        return
    card = f"a card of {limit / 2**30:.1f} GiB ({limit / 1e9:.1f} GB)"
    if found.best is None:
        smallest = found.smallest
        console.out.print(
            f"{config.name} does not fit {gpus} x {card}: the smallest of {found.tried} settings, "
            f"{' '.join(smallest.changes) or 'the recipe itself'}, needs {_gigabytes(smallest.peak_bytes)} for its "
            f"tensors ({_gigabytes(found.weights_bytes)} of them frozen weights) and "
            f"{_gigabytes(found.overhead_bytes)} for context, workspaces and fragmentation."
            + (" More cards can share every layer: give more --gpus." if limit > found.overhead_bytes else ""),
            highlight=False,
        )
        return
    best = found.best
    paid = "" if price is None else f", {best.time.hours * gpus * price:,.2f} at the price given"
    speed = f"{device.name}, for want of a --device" if assumed else device.name
    console.out.print(
        f"{config.name} fits {gpus} x {card} with {_gigabytes(best.peak_bytes)} of tensors (simulated) and "
        f"{_gigabytes(found.overhead_bytes)} for context, workspaces and fragmentation.\n"
        f"{duration(3600 * best.time.hours)} for the whole recipe, {training_set.source}, at the speed of {speed} "
        f"(extrapolated){paid}: the fastest of {found.tried} settings tried.\n",
        highlight=False,
    )
    console.out.print(command, highlight=False, markup=False, soft_wrap=True)


def _gigabytes(bytes: float) -> str:
    return f"{bytes / 1e9:.1f} GB"


@app.command()
def params(
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count a recipe's parameters, exactly and without loading anything."""
    from lavin_ds.models.counting import count_parameters

    count = count_parameters(load_recipe(recipe, overrides or []))
    if as_json:
        print(json.dumps({"recipe": recipe} | count.as_dict(), indent=2))
    else:
        console.out.print(_parameter_table(recipe, count))


def _config(recipe: str | None, record: RunRecord | None, overrides: list[str], micro_batch: int | None) -> RunConfig:
    if recipe is None and record is None:
        raise UserError("Give --recipe NAME or --run RUN; both: the recipe, as fast as the run was.")
    if recipe is None:
        if overrides or micro_batch:
            raise UserError("A finished run's recipe cannot be changed: give --recipe with the changes too.")
        return record.config
    if micro_batch:
        overrides = [*overrides, f"training.micro_batch={micro_batch}"]
    return load_recipe(recipe, overrides)


def _print(report: Report) -> None:
    console.out.print(_cost_table(report))
    console.out.print(_legend(report), highlight=False)
    console.out.print()
    console.out.print(_memory_table(report))
    console.out.print()
    if report.published:
        console.out.print(_savings_table(report))
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


def _savings_table(report: Report) -> Table:
    stages = report.published.stages
    table = Table(title=f"{report.config.name}: from the authors' way to ours, GB at the peak", title_justify="left")
    table.add_column("Each keeps those above it")
    for heading in ("full\nmicro-batch", "", "average\nmicro-batch", "", "TFLOP"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(stages):
        before = stages[number - 1] if number else stage
        table.add_row(
            stage.name,
            f"{stage.full_bytes / 1e9:.2f}",
            _change(stage.full_bytes - before.full_bytes),
            f"{stage.average_bytes / 1e9:.2f}",
            _change(stage.average_bytes - before.average_bytes),
            f"{stage.average_flops / 1e12:.1f}",
        )
    return table


def _change(bytes: int) -> str:
    return f"{bytes / 1e9:+.2f}" if abs(bytes) >= 5e6 else ""


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
