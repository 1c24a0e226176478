"""`lavin-ds quickstart`: the whole pipeline on the embedded sample, in minutes and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lavin_ds.cli import console


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to make, for everything that the quickstart makes.")] = Path(
        "lavin-quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions and of the training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """A small LLaMA that cannot see learns to see: sample data, shards, two trainings, scores, cost, export.

    Every step is also a command, which is shown before it runs.
    """
    from lavin_ds.cli.profile import show_run
    from lavin_ds.quickstart import Quickstart

    console.err.print(
        "A frozen 4-layer LLaMA and a frozen 8-layer ViT, never trained together, learn to answer questions about "
        "pictures.\n"
        "It takes a few minutes on two CPU cores.",
        highlight=False,
    )
    summary = Quickstart(out, seed, on_command=_show_command).run(console.progress, show_run)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console.out.print(_accuracy_table(summary))
    console.out.print(_cost_table(summary))


def _show_command(number: int, total: int, meaning: str, command: list[str]) -> None:
    console.err.print(f"\n[bold]{number}/{total} {meaning}[/]", highlight=False)
    console.err.print(f"[dim]$ {escape(' '.join(command))}[/]", highlight=False, soft_wrap=True)


def _accuracy_table(summary: dict) -> Table:
    table = Table(
        title="Accuracy on held-out questions, %", title_justify="left", caption=CAPTION, caption_justify="left"
    )
    table.add_column("")
    for column in summary["chance"]:
        table.add_column(column, justify="right", style="bold" if column == "IMG" else "")
    for key, name in NAMES.items():
        table.add_row(name, *(f"{value:.1f}" for value in summary["accuracy"][key].values()))
    table.add_row("chance", *(f"{value:.1f}" for value in summary["chance"].values()), style="dim")
    return table


NAMES = {"base": "frozen base", "text_only": "text-only adapters", "lavin": "LaVIN"}
CAPTION = "IMG: questions whose answer is only in the picture. TXT: with a hint. NO: with neither."


def _cost_table(summary: dict) -> Table:
    table = Table(title="What it took", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("trainable parameters", f"{summary['trainable_parameters']:,}")
    table.add_row("adapter file", f"{summary['adapter_bytes'] / 1e3:,.0f} kB")
    table.add_row("time", f"{summary['seconds']:.0f} s, {summary['training_seconds']:.0f} s of it for training LaVIN")
    table.add_row("peak memory", f"{summary['peak_rss_bytes'] / 2**20:,.0f} MiB in the largest process")
    for name, path in summary["paths"].items():
        table.add_row(name.replace("_", " "), path)
    return table
