"""`lavin-ds train` chooses the number of ranks and starts `deepspeed launch/train.py` on them.
`lavin-ds validate` runs only the checks that `train` begins with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lavin_ds.cli import console
from lavin_ds.launching.arguments import TrainArguments, takes_run_options

Ranks = Annotated[
    int | None, typer.Option(min=1, help="Ranks on this machine; default: one per GPU, or per core up to 2.")
]
Hostfile = Annotated[Path | None, typer.Option(help="DeepSpeed hostfile, for several nodes.")]
Force = Annotated[bool, typer.Option("--force", help="Start even if the simulated memory exceeds the free memory.")]


@takes_run_options
def train(arguments: TrainArguments, ranks: Ranks = None, hostfile: Hostfile = None, force: Force = False) -> None:
    """Train adapters. `lavin-ds validate` with the same arguments only runs the checks."""
    from lavin_ds.launching.launcher import launch

    raise typer.Exit(launch(arguments, ranks, hostfile, force))


def _validate(
    arguments: TrainArguments,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the checks of `lavin-ds train` with the same arguments. --out may be left out. Exit code 2 if a check
    fails."""
    from lavin_ds.launching.launcher import all_checks

    out = arguments.out
    with console.err.status("checking"):
        checks = all_checks(replace(arguments, out=out or Path("run")), ranks, hostfile, force)
    checks = [check for check in checks if out or check.name != "run directory"]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        console.out.print(_checklist(checks))
    raise typer.Exit(0 if all(check.passed for check in checks) else 2)


validate = takes_run_options(_validate, out=None)


def _checklist(checks) -> Table:
    wrong = sum(not check.passed for check in checks)
    table = Table(title=f"{wrong} of {len(checks)} checks failed" if wrong else "Ready to train", title_justify="left")
    table.add_column("Check", no_wrap=True)
    table.add_column("")
    table.add_column("Found")
    for check in checks:
        mark = Text("ok", style="green") if check.passed else Text("WRONG", style="bold red")
        if check.warning:
            mark = Text("warning", style="yellow")
        table.add_row(check.name, mark, Text(check.found, overflow="fold"))
    return table
