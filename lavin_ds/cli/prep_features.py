"""`lavin-ds prep features`: features of images from a frozen CLIP, cached in a shard directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from lavin_ds.cli import console
from lavin_ds.config import load_recipe


def features(
    data: Annotated[Path, typer.Option(help="Shard directory; the features are added to it.")],
    clip: Annotated[Path, typer.Option(help="CLIP weights.")],
    recipe: Annotated[str, typer.Option(help="Recipe name or YAML file; its ViT must have no adapters.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per GPU, or one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace features of another kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Compute every image's features once, for recipes with model.vision_source: cached."""
    config = load_recipe(recipe, overrides or [])
    # torch takes seconds to import. A wrong recipe is reported before that.
    import torch

    from lavin_ds.data_prep.features import extract, finish, plan

    started = time.monotonic()
    job = plan(data, clip, config, overwrite)
    ranks = ranks or max(1, torch.cuda.device_count())
    if job.done:
        console.err.print(f"{data} already has these features.", highlight=False)
    elif ranks > 1:
        _launch(data, clip, recipe, overrides or [], ranks, overwrite)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with console.progress("prep features") as update:
            extract(job, device, on_progress=update)
        finish(job)
    summary = _summary(data, time.monotonic() - started)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console.out.print(
        f"{data}: features of {summary['images']:,} images, {summary['rows_per_image']} x {summary['width']} float32 "
        f"(computed in {summary['computed_in']}), {summary['bytes'] / 1e6:,.1f} MB in {summary['files']} files, "
        f"{summary['seconds']:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _launch(data: Path, clip: Path, recipe: str, overrides: list[str], ranks: int, overwrite: bool) -> None:
    from lavin_ds.launching.deepspeed_command import launch_command
    from lavin_ds.launching.process import run_to_the_end
    from lavin_ds.machine import free_port

    words = ["--data", str(data), "--clip", str(clip), "--recipe", recipe, *overrides]
    words += ["--overwrite"] if overwrite else []
    if code := run_to_the_end(launch_command("features.py", ranks, None, free_port(), words)):
        raise typer.Exit(code)


def _summary(data: Path, seconds: float) -> dict:
    from lavin_ds.data.schema import load_manifest

    entry = load_manifest(data).features
    return {
        "images": entry.rows,
        "rows_per_image": entry.rows_per_image,
        "width": entry.width,
        "computed_in": entry.computed_in,
        "clip_sha256": entry.clip_sha256,
        "files": len(entry.files),
        "bytes": sum(file.bytes for file in entry.files),
        "seconds": round(seconds, 3),
    }
