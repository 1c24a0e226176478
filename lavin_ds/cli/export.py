"""`lavin-ds export ...`: writes the adapters of a run to a file."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lavin_ds.cli import console

app = typer.Typer(help="Export what a run has learnt.", no_args_is_help=True)


class AdapterLayout(str, Enum):
    safetensors = "safetensors"
    official = "official"


@app.callback()
def _group() -> None:
    """Without this callback typer would drop the word `adapter`, because it is the only command."""


@app.command()
def adapter(
    run: Annotated[Path, typer.Option(help="Directory of a complete training run.")],
    out: Annotated[Path, typer.Option(help="File to make: .safetensors, or .pth in the authors' layout.")],
    layout: Annotated[
        AdapterLayout, typer.Option(help="safetensors, or official: as the LaVIN authors' scripts read it.")
    ] = AdapterLayout.safetensors,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write the adapters to a file, and a JSON file beside it with their base, recipe and shapes."""
    from lavin_ds.weights.adapter import record_file
    from lavin_ds.weights.export import export_adapter

    record = export_adapter(run, out, layout.value)
    summary = {
        "out": str(out),
        "record": str(record_file(out)),
        "recipe": record.recipe,
        "llama": record.base.llama.path,
        "clip": record.base.clip.path if record.base.clip else None,
        "tensors": len(record.tensors),
        "parameters": record.trainable_parameters,
        "bytes": record.bytes,
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    table = Table("", "", show_header=False, title=f"Adapters of {run}")
    for key, value in summary.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value or "none"))
    console.out.print(table)
