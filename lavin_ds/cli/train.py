"""`lavin-ds train`: works out the ranks of this machine and starts `deepspeed launch/train.py` on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    data: Annotated[Path, typer.Option(help="Shards that `lavin-ds prep` made.")],
    llama: Annotated[Path, typer.Option(help="Folder of the LLaMA, in Meta's or Hugging Face's layout.")],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    clip: Annotated[Path | None, typer.Option(help="CLIP weights; not for text-only recipes.")] = None,
    resume: Annotated[str, typer.Option(help="never, or auto: go on where --out stopped.")] = "never",
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks here; default: GPUs, or up to 2 cores.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile, for several nodes.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
) -> None:
    """Train adapters. Everything is checked before the first rank starts."""
    from lavin_ds.training.arguments import TrainArguments
    from lavin_ds.training.launcher import launch

    if resume not in ("never", "auto"):
        raise typer.BadParameter("give never or auto", param_hint="--resume")
    arguments = TrainArguments(recipe, data, llama, clip, out, resume, tuple(overrides or ()))
    raise typer.Exit(launch(arguments, ranks, hostfile))
