"""`lavin-ds prep ...`: source data to Arrow shards, one command per kind of data."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from enum import Enum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich import box
from rich.table import Table

from lavin_ds.cli import console
from lavin_ds.config import load_recipe
from lavin_ds.data_prep.records import Source
from lavin_ds.data_prep.sources import SOURCES
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data_prep.pipeline import PrepReport

app = typer.Typer(help="Prepare data: source files to Arrow shards.", no_args_is_help=True)


HEADINGS = {"evaluation_only": "no labels"}  # of columns whose heading differs from the manifest's key


class OnError(str, Enum):
    fail = "fail"
    skip = "skip"


def _command(source: type[Source]) -> Callable[..., None]:
    """The function of `prep KIND`: the source's own options, then those of all kinds."""

    def run(
        *,
        tokenizer: Annotated[Path, typer.Option(help="The base model's tokenizer.model or tokenizer.json.")],
        out: Annotated[Path, typer.Option(help="Shard directory to make.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="Changes to the recipe: data.max_length=256 ...")
        ] = None,
        recipe: Annotated[str, typer.Option(help="Recipe name or YAML file.")] = source.recipe,
        on_error: Annotated[OnError, typer.Option(help="Bad records: stop, or leave them out.")] = OnError.fail,
        workers: Annotated[
            int | None, typer.Option(min=1, help="Worker processes; default: one per available core.")
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older shard directory.")] = False,
        restart: Annotated[bool, typer.Option("--restart", help="Discard what a killed job has finished.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
        **own: Any,
    ) -> None:
        from lavin_ds.data_prep.pipeline import prepare

        config = load_recipe(recipe, overrides or [])
        given = source(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})
        with _interruptible(), ExitStack() as bars:
            report = prepare(
                given,
                tokenizer,
                out,
                config,
                on_error=on_error.value,
                workers=workers or len(os.sched_getaffinity(0)),
                overwrite=overwrite,
                restart=restart,
                on_progress=_stages(f"prep {source.kind}", bars),
            )
        _show(report, as_json)

    hints = get_type_hints(run, include_extras=True)
    shared = [p.replace(annotation=hints[p.name]) for p in Signature.from_callable(run).parameters.values()]
    # typer reads options from the signature.
    run.__signature__ = Signature([*_options(source), *(p for p in shared if p.kind is Parameter.KEYWORD_ONLY)])
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
    return run


def _options(source: type[Source]) -> list[Parameter]:
    """A source's fields as typer's options."""
    hints = get_type_hints(source)
    options = []
    for field in fields(source):
        kind = hints[field.name]
        if get_origin(kind) is tuple:  # tuple[X, ...]: the option may be repeated
            kind = list[get_args(kind)[0]]
        kind = Annotated[kind, typer.Option(help=field.metadata["help"])]
        default = Parameter.empty if field.default is MISSING else field.default
        options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return options


for _source in SOURCES.values():
    app.command(_source.kind, help=_source.__doc__)(_command(_source))


@contextmanager
def _interruptible() -> Iterator[None]:
    """After an interruption, says how to continue. SIGTERM ends the job in the same way as Ctrl-C."""
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.err.print("Stopped. Finished files are kept: the same command continues from there.")
        raise


def _end(number: int, _frame) -> None:
    raise SystemExit(128 + number)


def _stages(title: str, bars: ExitStack) -> Callable[[str, int, int], None]:
    """Shows the progress of each pass separately, with its own rate and time left."""
    current, update = None, None

    def show(stage: str, done: int, total: int) -> None:
        nonlocal current, update
        if stage != current:
            bars.close()
            current, update = stage, bars.enter_context(console.progress(f"{title}: {stage}"))
        update(done, total)

    return show


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to make, in ScienceQA's official layout.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions and pictures.")] = 0,
) -> None:
    """Draw the quickstart's small ScienceQA: generated questions and pictures."""
    from lavin_ds.data_prep.sample import generate

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: give another.")
    generate(out, seed)
    console.err.print(f"wrote {out}", highlight=False)


def _show(report: PrepReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary(report), indent=2))
    else:
        console.out.print(_table(report))
        _remark(report)


def summary(report: PrepReport) -> dict:
    """What --json prints."""
    return {
        "out": str(report.out),
        "splits": {
            name: {
                "records": split.records,
                "rows": split.rows,
                "images": split.images,
                "median_positions": report.median_positions[name],
                "max_positions": report.max_positions[name],
                "lengths": split.lengths.model_dump(),
                "rejected": split.rejected,
            }
            for name, split in report.manifest.splits.items()
        },
        "images": report.manifest.images.rows if report.manifest.images else 0,
        "bytes": report.bytes,
        "resumed_files": report.resumed,
        "seconds": round(report.seconds, 3),
    }


def _table(report: PrepReport) -> Table:
    """One row per split. Columns of length outcomes that are all zeros are left out."""
    from lavin_ds.data.schema import LengthCounts

    splits = report.manifest.splits
    outcomes = [k for k in LengthCounts.model_fields if any(getattr(s.lengths, k) for s in splits.values())]
    size = f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    caption = "median, max: positions of a sample laid out for training"
    title = f"{report.out}: {size}"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))  # ten columns in 80 characters
    columns = {name: {"rows": s.rows, "images": s.images} for name, s in splits.items()}
    if any(s.records != sum(s.lengths.model_dump().values()) + s.rejected for s in splits.values()):
        columns = {name: {"records": splits[name].records, **column} for name, column in columns.items()}
    for name, s in splits.items():
        columns[name] |= {"median": report.median_positions[name], "max": report.max_positions[name]}
        columns[name] |= {HEADINGS.get(outcome, outcome): getattr(s.lengths, outcome) for outcome in outcomes}
        if any(s.rejected for s in splits.values()):
            columns[name]["rejected"] = s.rejected
    table.add_column("split", no_wrap=True)
    for heading in next(iter(columns.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, column in columns.items():
        table.add_row(name, *(f"{count:,}" for count in column.values()))
    return table


def _remark(report: PrepReport) -> None:
    """Reports long samples and bad records, if there are any."""
    from lavin_ds.data.prompts import CONVERSATION

    splits, prompt = report.manifest.splits.values(), report.manifest.prompt
    limit, lost = prompt.max_length, "context or last turns" if prompt.format == CONVERSATION else "context"
    remarks = {
        "shortened": f"had their {lost} cut to fit data.max_length {limit}",
        "cut": f"lost tokens at the end to fit data.max_length {limit}",
        "evaluation_only": f"cannot be trained on within data.max_length {limit}; their prompts are kept",
        "dropped": f"left out: not even the prompt fits data.max_length {limit}",
    }
    if report.resumed:
        console.err.print(f"{report.resumed} files were finished by an earlier run.", highlight=False)
    for outcome, meaning in remarks.items():
        if count := sum(getattr(split.lengths, outcome) for split in splits):
            console.err.print(f"{count:,} samples {meaning}.", highlight=False)
    if rejected := sum(split.rejected for split in splits):
        console.err.print(f"{rejected} bad records left out, see {report.out / 'rejects.jsonl'}.")
