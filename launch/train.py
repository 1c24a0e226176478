"""The training script that `deepspeed` starts on every rank:

    deepspeed launch/train.py --recipe lavin-7b --data SHARDS --llama DIR --clip FILE --out RUN [key=value ...]

`lavin-ds train` counts the GPUs of this machine and starts this script in the same way.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lavin_ds.launching.arguments import TrainArguments, takes_run_options


def main(
    arguments: TrainArguments,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # the launcher adds it
) -> None:
    """Train LaVIN under the deepspeed launcher."""
    from lavin_ds.launching import rank

    code = rank.run(arguments)
    if code in (1, 2):
        rank.end(code)
    sys.exit(code)


if __name__ == "__main__":
    typer.run(takes_run_options(main))
