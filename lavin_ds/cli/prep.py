"""`lavin-ds prep ...`: source data to Arrow shards."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from lavin_ds.cli import console
from lavin_ds.config import load_recipe
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data_prep.pipeline import PrepReport

app = typer.Typer(help="Prepare data: source files to Arrow shards.", no_args_is_help=True)


class OnError(str, Enum):
    fail = "fail"
    skip = "skip"


# The options that every source of data has.
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: data.max_length=256 ...")]
TokenizerFile = Annotated[Path, typer.Option(help="The base model's SentencePiece tokenizer.model.")]
Out = Annotated[Path, typer.Option(help="Shard directory to make.")]
Recipe = Annotated[str, typer.Option(help="Recipe name or YAML file.")]
OnErrorOption = Annotated[OnError, typer.Option(help="Bad records: stop, or leave them out.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes at work; default the cores available.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older shard directory.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what a killed job has finished.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


@app.command()
def scienceqa(
    data: Annotated[Path, typer.Option(help="Folder with problems.json, pid_splits.json and images/.")],
    tokenizer: TokenizerFile,
    out: Out,
    overrides: Overrides = None,
    recipe: Recipe = "lavin-7b",
    splits: Annotated[str, typer.Option(help="Comma-separated; default those of train,val,test that exist.")] = "",
    on_error: OnErrorOption = OnError.fail,
    workers: Workers = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """ScienceQA in its official folder layout to shards, as the recipe wants its prompts and images."""
    from lavin_ds.data_prep.scienceqa import prepare_scienceqa

    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    config = load_recipe(recipe, overrides or [])
    with _job("scienceqa", on_error, workers, overwrite, restart) as options:
        report = prepare_scienceqa(data, tokenizer, out, config, wanted or None, **options)
    _show(report, as_json)


@app.command()
def instruct(
    tokenizer: TokenizerFile,
    out: Out,
    overrides: Overrides = None,
    alpaca: Annotated[list[Path] | None, typer.Option(help="Alpaca JSON; may be given several times.")] = None,
    llava: Annotated[
        list[Path] | None, typer.Option(help="LLaVA conversation JSON; may be given several times.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the image paths of LLaVA's files start from.")
    ] = None,
    recipe: Recipe = "chatbot-13b",
    on_error: OnErrorOption = OnError.fail,
    workers: Workers = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Instructions of Alpaca and LLaVA, mixed in one set; data.prompt_format says single-turn or conversation."""
    from lavin_ds.data_prep.instruct import prepare_instruct

    config = load_recipe(recipe, overrides or [])
    with _job("instruct", on_error, workers, overwrite, restart) as options:
        report = prepare_instruct(alpaca or [], llava or [], images, tokenizer, out, config, **options)
    _show(report, as_json)


@app.command()
def captions(
    annotations: Annotated[Path, typer.Option(help="Karpathy's dataset_coco.json.")],
    images: Annotated[Path, typer.Option(help="Folder with train2014/ and val2014/.")],
    tokenizer: TokenizerFile,
    out: Out,
    overrides: Overrides = None,
    recipe: Recipe = "captions-13b",
    splits: Annotated[str, typer.Option(help="Comma-separated; train includes restval.")] = "train,val,test",
    on_error: OnErrorOption = OnError.fail,
    workers: Workers = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """COCO captions with the Karpathy split: in train a row a caption, else a row an image with all its captions."""
    from lavin_ds.data_prep.captions import prepare_captions

    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    config = load_recipe(recipe, overrides or [])
    with _job("captions", on_error, workers, overwrite, restart) as options:
        report = prepare_captions(annotations, images, tokenizer, out, config, wanted, **options)
    _show(report, as_json)


@contextmanager
def _job(name: str, on_error: OnError, workers: int | None, overwrite: bool, restart: bool) -> Iterator[dict]:
    """The options of `prepare` that all commands share; shows progress, and what to do when it is interrupted."""
    signal.signal(signal.SIGTERM, _end)  # in order, as by Ctrl-C, so that workers end too
    try:
        with ExitStack() as bars:
            yield {
                "on_error": on_error.value,
                "workers": workers or len(os.sched_getaffinity(0)),
                "overwrite": overwrite,
                "restart": restart,
                "on_progress": _stages(f"prep {name}", bars),
            }
    except (KeyboardInterrupt, SystemExit):
        console.err.print("Stopped. What is finished is kept: the same command goes on from there.")
        raise


def _end(number: int, _frame) -> None:
    raise SystemExit(128 + number)


def _stages(title: str, bars: ExitStack) -> Callable[[str, int, int], None]:
    """One progress display a pass, with its own rate and time left."""
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
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other questions and pictures.")] = 0,
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
    """A row a split; columns that would say nothing are left out."""
    from lavin_ds.data.schema import LengthCounts

    splits = report.manifest.splits
    outcomes = [k for k in LengthCounts.model_fields if any(getattr(s.lengths, k) for s in splits.values())]
    headings = {"evaluation_only": "unused" if report.manifest.kind == "instruct" else "eval only"}
    size = f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    caption = "median, max: positions of a sample laid out for training"
    title = f"{report.out}: {size}"
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))  # ten columns in 80
    columns = {name: {"rows": s.rows, "images": s.images} for name, s in splits.items()}
    if any(s.records != sum(s.lengths.model_dump().values()) + s.rejected for s in splits.values()):
        columns = {name: {"records": splits[name].records, **column} for name, column in columns.items()}
    for name, s in splits.items():
        columns[name] |= {"median": report.median_positions[name], "max": report.max_positions[name]}
        columns[name] |= {headings.get(outcome, outcome): getattr(s.lengths, outcome) for outcome in outcomes}
        if any(s.rejected for s in splits.values()):
            columns[name]["rejected"] = s.rejected
    table.add_column("split", no_wrap=True)
    for heading in next(iter(columns.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, column in columns.items():
        table.add_row(name, *(f"{count:,}" for count in column.values()))
    return table


def _remark(report: PrepReport) -> None:
    """Says what the counts of long and bad samples mean, where there are any."""
    from lavin_ds.data.prompts import CONVERSATION

    splits, prompt = report.manifest.splits.values(), report.manifest.prompt
    instruct = report.manifest.kind == "instruct"  # nothing evaluates those
    kept = "training passes over them (a larger limit keeps them)" if instruct else "kept for evaluation"
    limit, lost = prompt.max_length, "context or last turns" if prompt.format == CONVERSATION else "context"
    remarks = {
        "shortened": f"had their {lost} cut to fit data.max_length {limit}",
        "cut": f"lost tokens at the end to fit data.max_length {limit}",
        "evaluation_only": f"cannot be trained on within data.max_length {limit}; {kept}",
        "dropped": f"left out: not even the prompt fits data.max_length {limit}",
    }
    if report.resumed:
        console.err.print(f"{report.resumed} files were finished by an earlier run.", highlight=False)
    for outcome, meaning in remarks.items():
        if count := sum(getattr(split.lengths, outcome) for split in splits):
            console.err.print(f"{count:,} samples {meaning}.", highlight=False)
    if rejected := sum(split.rejected for split in splits):
        console.err.print(f"{rejected} bad records left out, see {report.out / 'rejects.jsonl'}.")
