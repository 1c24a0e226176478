"""`lavin-ds profile`: what a recipe costs, before the first GPU hour."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lavin_ds.cli import console
from lavin_ds.config import load_recipe
from lavin_ds.devices import DEVICES, Device, custom_device, parse_bytes
from lavin_ds.errors import UserError

if TYPE_CHECKING:  # these import torch, which would slow down --help
    from lavin_ds.models.counting import ParameterCount
    from lavin_ds.profiling.fit import Fit
    from lavin_ds.profiling.report import Report, Request

MARK_STYLES = {"quoted": "dim", "exact": "green", "simulated": "cyan", "extrapolated": "yellow", "measured": "bold"}
HEADINGS = {"trainable": "#T-Params", "memory": "Memory", "time": "Time", "storage": "#Storage"}


class OverridesGroup(TyperGroup):
    """A group that accepts `key=value` arguments. Typer groups have options and subcommands only."""

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
        typer.Option(
            help="A finished run to compare with its prediction. With --recipe or --gpus: predict those at its speed."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs. Default: the run's ranks; else 8, or 1 on this CPU.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help=f"A GPU: {' '.join(DEVICES)}; or here, this CPU. Default: {DEFAULT_DEVICE}."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="bf16 TFLOP/s of a GPU not in the list; needs the next two options too.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of its memory.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of its memory.")] = None,
    link: Annotated[
        float | None, typer.Option(help="GB/s that one GPU can send. Several nodes: the network's, per GPU.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Shards to take lengths from. Default: ScienceQA's lengths.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per micro-batch. Default: the recipe's.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Positions per sample for the memory. Default: data.max_length.")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Share of the device's peak rates to assume.")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU for one hour.")] = None,
    as_published: Annotated[
        bool, typer.Option(help="Also simulate the authors' step, and what each saving removes.")
    ] = False,
    fit: Annotated[str | None, typer.Option(help="Find the fastest setting for cards of this size, as 24GiB.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the memory by component.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Write a PNG of the memory over a step.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    if ctx.invoked_subcommand:
        return
    if fit:
        unused = {"--run": run, "--micro-batch": micro_batch, "--length": length, "--as-published": as_published}
        unused |= {"--plot": plot, "--timeline": timeline, "--html": html}
        if given := [option for option, value in unused.items() if value]:
            raise UserError(f"--fit searches a recipe and prints a command. It has no use for {', '.join(given)}.")
    _check_files({"--plot": plot, "--timeline": timeline, "--html": html})
    overrides = overrides or []
    if recipe is None and run is None:
        raise UserError("Give --recipe NAME or --run RUN. Give both to predict the recipe at the run's speed.")
    if recipe is None and (overrides or micro_batch):
        raise UserError("A finished run's recipe cannot be changed. Give --recipe too, with the changes.")
    limit = parse_bytes(fit) if fit else None
    changes = [*overrides, f"training.micro_batch={micro_batch}"] if micro_batch else overrides
    config = load_recipe(recipe, changes) if recipe else None
    from lavin_ds.profiling.finished_run import load_finished_run
    from lavin_ds.profiling.report import Request, make_report
    from lavin_ds.profiling.training_set import find_training_set

    finished = load_finished_run(run) if run else None
    record = finished and finished.record
    config = config or record.config
    training_set = find_training_set(config, record, data)
    if training_set is None and (fit or as_published):
        raise UserError(
            f"The lengths of {config.data.prompt_format} data are not known without shards: give --data SHARDS."
        )
    gpus = gpus or (record.ranks if record else 1 if device == "here" else 8)
    request = Request(
        config=config,
        device=_device(device, (tflops, bandwidth, memory), link, gpus),
        gpus=gpus,
        training_set=training_set,
        efficiency=efficiency,
        length=length,
        price=price,
        run=finished,
        at_run_speed=finished is not None and (recipe is not None or gpus != record.ranks),
    )
    if fit:
        assumed = device is None and tflops is None
        _fit(request, limit, recipe, overrides, assumed, as_json)
        return
    with console.err.status("simulating a training step"):
        report = make_report(request)
        if as_published:
            from lavin_ds.profiling.published.savings import as_published as simulate_published

            report = replace(report, published=simulate_published(config, training_set))
    written = _write_files(report, plot, timeline, html)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    _print(report)
    for path in written:
        console.err.print(f"wrote {path}", highlight=False)


def show_run(run: Path) -> None:
    """Prints a finished run's cost table to stderr: the first table of `lavin-ds profile --run`."""
    from lavin_ds.profiling.finished_run import load_finished_run
    from lavin_ds.profiling.report import Request, make_report
    from lavin_ds.profiling.training_set import find_training_set

    finished = load_finished_run(run)
    record = finished.record
    training_set = find_training_set(record.config, record)
    with console.err.status("simulating a training step"):
        report = make_report(Request(record.config, DEVICES[DEFAULT_DEVICE], record.ranks, training_set, run=finished))
    console.err.print(_cost_table(report))
    console.err.print(_legend(report), highlight=False)


def _device(
    name: str | None, figures: tuple[float | None, float | None, float | None], link: float | None, gpus: int
) -> Device:
    from lavin_ds.profiling.calibration import HERE, device_named

    given = [figure for figure in figures if figure is not None]
    if given and (len(given) < len(figures) or name):
        raise UserError("Your own device needs all of --tflops, --bandwidth and --memory, and no --device.")
    if any(figure <= 0 for figure in (*given, *([] if link is None else [link]))):
        raise UserError("--tflops, --bandwidth, --memory and --link must be above 0.")
    if name == HERE:
        console.err.print("measuring a few training steps of small models on this CPU", highlight=False)
    device = custom_device(*given) if given else device_named(name or DEFAULT_DEVICE, gpus)
    return replace(device, link=link) if link else device


def _check_files(files: dict[str, Path | None]) -> None:
    """Checks the paths before minutes are spent on their contents."""
    for option, path in files.items():
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}.")
        if option != "--html" and path.suffix.lower() != ".png":
            raise UserError(f"{option} {path}: the file will be a PNG. Give a name that ends with .png.")


def _write_files(report: Report, plot: Path | None, timeline: Path | None, html: Path | None) -> list[Path]:
    from lavin_ds.files import write_atomically
    from lavin_ds.profiling.html_report import html_report
    from lavin_ds.profiling.plots import plot_memory, plot_timeline

    if plot:
        plot_memory(report, plot)
    if timeline:
        plot_timeline(report.memory, f"{report.config.name}: memory over one step", timeline)
    if html:
        text = html_report(report)
        write_atomically(html, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [path for path in (plot, timeline, html) if path]


def _fit(request: Request, limit: int, recipe: str, overrides: list[str], assumed: bool, as_json: bool) -> None:
    """assumed: the user named no device, so times are for the default one."""
    from lavin_ds.profiling.fit import find_fit

    with console.err.status("trying settings") as status:
        found = find_fit(
            request.config,
            limit,
            request.device,
            request.gpus,
            request.training_set,
            request.efficiency,
            status.update,
        )
    command = found.command(recipe, request.gpus, overrides)
    if as_json:
        print(json.dumps(found.as_dict() | {"command": command}, indent=2))
        return
    speed = f"{request.device.name}, as no --device was given" if assumed else request.device.name
    console.out.print(_fit_text(found, request, speed), highlight=False)
    if command:
        console.out.print(command, highlight=False, markup=False, soft_wrap=True)


def _fit_text(found: Fit, request: Request, speed: str) -> str:
    from lavin_ds.profiling.report import duration

    name, gpus, limit = request.config.name, request.gpus, found.limit_bytes
    card = f"{gpus} x a card of {limit / 2**30:.1f} GiB ({limit / 1e9:.1f} GB)"
    overhead = f"{_gigabytes(found.overhead_bytes)} for context, workspaces and fragmentation"
    if found.best is None:
        smallest = found.smallest
        return (
            f"{name} does not fit {card}. The smallest of {found.tried} settings "
            f"({' '.join(smallest.changes) or 'the recipe itself'}) needs {_gigabytes(smallest.peak_bytes)} for "
            f"tensors ({_gigabytes(found.weights_bytes)} of them frozen weights) and {overhead}."
            + (" More cards can share every layer: give more --gpus." if limit > found.overhead_bytes else "")
        )
    hours = found.best.time.hours
    paid = "" if request.price is None else f", {hours * gpus * request.price:,.2f} at the given price"
    return (
        f"{name} fits {card} with {_gigabytes(found.best.peak_bytes)} of tensors (simulated) and {overhead}.\n"
        f"{duration(3600 * hours)} for the whole recipe, {request.training_set.source}, at the speed of {speed} "
        f"(extrapolated){paid}: the fastest of {found.tried} settings tried.\n"
    )


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
    """Count a recipe's parameters exactly, without loading weights."""
    from lavin_ds.models.counting import count_parameters

    count = count_parameters(load_recipe(recipe, overrides or []))
    if as_json:
        print(json.dumps({"recipe": recipe} | count.as_dict(), indent=2))
    else:
        console.out.print(_parameter_table(recipe, count))


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
    where = f"quoted rows: 8 x A100, lite 1 GPU; ours: {report.gpus} x {report.device.name}"
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
    from lavin_ds.profiling.simulation import COMPONENTS

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
    table.add_column("Savings, one added at a time")
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
