"""`lavin-ds train`: works out the ranks of this machine and starts `deepspeed launch/train.py` on them.
`lavin-ds validate`: the checks that come first, as a list."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lavin_ds.cli import console

Recipe = Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")]
Data = Annotated[Path, typer.Option(help="Shards that `lavin-ds prep` made.")]
Llama = Annotated[Path, typer.Option(help="Folder of the LLaMA, in Meta's or Hugging Face's layout.")]
Out = Annotated[Path, typer.Option(help="Run directory to make.")]
Clip = Annotated[Path | None, typer.Option(help="CLIP weights; not for text-only recipes.")]
InitAdapter = Annotated[Path | None, typer.Option(help="Exported adapter to start from, instead of a new one.")]
Resume = Annotated[str, typer.Option(help="never, or auto: go on where --out stopped.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks here; default: GPUs, or up to 2 cores.")]
Hostfile = Annotated[Path | None, typer.Option(help="DeepSpeed hostfile, for several nodes.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]


def train(
    recipe: Recipe,
    data: Data,
    llama: Llama,
    out: Out,
    clip: Clip = None,
    init_adapter: InitAdapter = None,
    resume: Resume = "never",
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    overrides: Overrides = None,
) -> None:
    """Train adapters; `lavin-ds validate` with the same words checks everything without doing it."""
    from lavin_ds.training.launcher import launch

    arguments = _arguments(recipe, data, llama, clip, out, resume, init_adapter, overrides)
    raise typer.Exit(launch(arguments, ranks, hostfile))


def validate(
    recipe: Recipe,
    data: Data,
    llama: Llama,
    out: Annotated[Path | None, typer.Option(help="Run directory to make; checked if given.")] = None,
    clip: Clip = None,
    init_adapter: InitAdapter = None,
    resume: Resume = "never",
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what `lavin-ds train` would do with the same words. Exit code 2 if anything is wrong."""
    from lavin_ds.training.launcher import all_checks

    arguments = _arguments(recipe, data, llama, clip, out or Path("run"), resume, init_adapter, overrides)
    with console.err.status("checking"):
        checks = all_checks(arguments, ranks, hostfile)
    checks = [check for check in checks if out or check.name != "run directory"]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        console.out.print(_checklist(checks))
    raise typer.Exit(0 if all(check.passed for check in checks) else 2)


def _arguments(recipe, data, llama, clip, out, resume, init_adapter, overrides):
    from lavin_ds.training.arguments import TrainArguments

    if resume not in ("never", "auto"):
        raise typer.BadParameter("give never or auto", param_hint="--resume")
    return TrainArguments(recipe, data, llama, clip, out, resume, init_adapter, tuple(overrides or ()))


def _checklist(checks) -> Table:
    wrong = sum(not check.passed for check in checks)
    table = Table(title=f"{wrong} of {len(checks)} checks failed" if wrong else "Ready to train", title_justify="left")
    table.add_column("Check", no_wrap=True)
    table.add_column("")
    table.add_column("Found")
    for check in checks:
        mark = Text("ok", style="green") if check.passed else Text("WRONG", style="bold red")
        table.add_row(check.name, mark, Text(check.found, overflow="fold"))
    return table
