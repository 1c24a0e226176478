"""`lavin-ds prep ...`: source data to Arrow shards."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from lavin_ds.cli import console
from lavin_ds.config import load_recipe
from lavin_ds.data.schema import LengthCounts
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import PrepReport, prepare_scienceqa
from lavin_ds.errors import UserError

app = typer.Typer(help="Prepare data: source files to Arrow shards.", no_args_is_help=True)


class OnError(str, Enum):
    fail = "fail"
    skip = "skip"


@app.callback()
def _group() -> None:
    """Keeps `scienceqa` a command of its own while it is the only one."""


@app.command()
def scienceqa(
    data: Annotated[Path, typer.Option(help="Folder with problems.json, pid_splits.json and images/.")],
    tokenizer: Annotated[Path, typer.Option(help="The base model's SentencePiece tokenizer.model.")],
    out: Annotated[Path, typer.Option(help="Shard directory to make.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe: data.max_length=256 ...")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe name or YAML file.")] = "lavin-7b",
    splits: Annotated[str, typer.Option(help="Comma-separated; default those of train,val,test that exist.")] = "",
    on_error: Annotated[OnError, typer.Option(help="Bad records: stop, or leave them out.")] = OnError.fail,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older shard directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """ScienceQA in its official folder layout to shards, as the recipe wants its prompts and images."""
    config = load_recipe(recipe, overrides or [])
    wanted = [name.strip() for name in splits.split(",") if name.strip()]
    with console.progress("prep scienceqa") as update:
        report = prepare_scienceqa(
            data, tokenizer, out, config, wanted or None, on_error.value, overwrite, on_progress=update
        )
    if as_json:
        print(json.dumps(summary(report), indent=2))
    else:
        console.out.print(_table(report))
        _remark(report)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to make, in ScienceQA's official layout.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other questions and pictures.")] = 0,
) -> None:
    """Draw the quickstart's small ScienceQA: generated questions and pictures."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder: give another.")
    generate(out, seed)
    console.err.print(f"wrote {out}", highlight=False)


def summary(report: PrepReport) -> dict:
    """What --json prints."""
    return {
        "out": str(report.out),
        "splits": {
            name: {
                "rows": split.rows,
                "images": split.images,
                "median_tokens": report.median_tokens[name],
                "max_tokens": report.max_tokens[name],
                "lengths": split.lengths.model_dump(),
                "rejected": split.rejected,
            }
            for name, split in report.manifest.splits.items()
        },
        "images": report.manifest.images.rows if report.manifest.images else 0,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
    }


def _table(report: PrepReport) -> Table:
    """A row a split; columns of outcomes that no sample had are left out."""
    splits = report.manifest.splits
    outcomes = [k for k in LengthCounts.model_fields if any(getattr(s.lengths, k) for s in splits.values())]
    size = f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    caption = "median, max: tokens of a sample laid out for training"
    table = Table(title=f"{report.out}: {size}", caption=caption, box=box.SIMPLE)  # no grid: ten columns in 80
    table.add_column("split", no_wrap=True)
    headings = ["rows", "images", "median", "max", *outcomes, "rejected"]
    for heading in headings:
        table.add_column(heading.replace("evaluation_", "eval "), justify="right", no_wrap=True)
    for name, split in splits.items():
        counts = [split.rows, split.images, report.median_tokens[name], report.max_tokens[name]]
        counts += [getattr(split.lengths, outcome) for outcome in outcomes] + [split.rejected]
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _remark(report: PrepReport) -> None:
    """Says what the counts of long and bad samples mean, where there are any."""
    splits, limit = report.manifest.splits.values(), report.manifest.prompt.max_length
    remarks = {
        "shortened": f"had their context cut to fit data.max_length {limit}",
        "cut": f"lost tokens at the end to fit data.max_length {limit}",
        "evaluation_only": f"cannot be trained on within data.max_length {limit}; kept for evaluation",
        "dropped": f"left out: not even the prompt fits data.max_length {limit}",
    }
    for outcome, meaning in remarks.items():
        if count := sum(getattr(split.lengths, outcome) for split in splits):
            console.err.print(f"{count} samples {meaning}.", highlight=False)
    if rejected := sum(split.rejected for split in splits):
        console.err.print(f"{rejected} bad records left out, see {report.out / 'rejects.jsonl'}.")
