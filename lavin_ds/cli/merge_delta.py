"""`lavin-ds merge-delta`: Vicuna v0 from LLaMA and its published delta."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lavin_ds.cli import console


def merge_delta(
    base: Annotated[Path, typer.Option(help="LLaMA: a folder of Meta's or Hugging Face's files.")],
    delta: Annotated[Path, typer.Option(help="The delta, such as vicuna-7b-delta-v0: a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Folder to make; other commands take it as --llama.")],
    drop_added_rows: Annotated[
        bool, typer.Option(help="Leave out tokens that the base lacks (v0's [PAD]), so that the base's recipes fit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Add a published delta (Vicuna v0) to its base, as a Hugging Face folder."""
    from lavin_ds.weights.delta import merge_delta as merge

    with console.progress("Adding tensors") as update:
        merged = merge(base, delta, out, drop_added_rows, update)
    summary = asdict(merged) | {"out": str(merged.out)}
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    table = Table("", "", show_header=False, title=f"{base.name} plus {delta.name}")
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    console.out.print(table)
    if merged.added_rows and not drop_added_rows:
        console.out.print(f"Train on it with model.llm.vocab_size={merged.vocab_size}.")
