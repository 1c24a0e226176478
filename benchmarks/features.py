"""Compares feature extraction with the bare forward pass, in images per second: same ViT, same batches, same run.

    python benchmarks/features.py [--images N] [--recipe NAME] [--folder DIR] [--json] [key=value ...]

Makes a shard directory of N random images and a random CLIP of the recipe's shape (default: ViT-B/16, the shape of
ablation-vision). Then it alternates between

    bare   the ViT on normalised tensors that are already in memory; its output is not copied
    job    `lavin-ds prep features`, from the shards to finished files with checksums, including loading the weights

The ratio is that of the medians of ROUNDS turns. The exit code is 1 if the job has less than 0.9 of the bare rate.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

from harness import show, table

import numpy as np
import torch
import typer
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.schema import (
    IMAGE_SCHEMA,
    MANIFEST_NAME,
    ROW_SCHEMA,
    SCHEMA_VERSION,
    ImageEntry,
    LengthCounts,
    Manifest,
    PromptSettings,
    SplitEntry,
    TokenizerEntry,
)
from lavin_ds.data.shards import IMAGE_BATCH, ROW_BATCH, write_shard
from lavin_ds.data_prep import features
from lavin_ds.files import write_json
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.vision import VisionTower
from lavin_ds.weights.clip import load_clip

LIMIT, ROUNDS = 0.9, 3


def write_clip(path: Path, config: RunConfig) -> Path:
    vision = config.model.vision
    shape = {key: getattr(vision, key) for key in ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")}
    vit = VisionTransformer(**shape, output_dim=8, act_layer=QuickGELU)
    save_file({f"visual.{name}": value.contiguous() for name, value in vit.state_dict().items()}, path)
    return path


def write_images(folder: Path, config: RunConfig, images: int) -> Path:
    """A shard directory of one text row and `images` random pictures."""
    folder.mkdir()
    size, rng = config.model.vision.image_size, np.random.default_rng(0)
    pixels = ({"id": str(i), "source": str(i), "pixels": rng.bytes(size * size * 3)} for i in range(images))
    files = [write_shard(folder / "images-00000.arrow", IMAGE_SCHEMA, pixels, IMAGE_BATCH)]
    row = dict.fromkeys(("id", "subject", "grade"), "") | dict.fromkeys(("has_image", "has_hint"), False)
    row |= dict.fromkeys(("token_ids", "label_spans", "prompt_ids", "references"), [])
    row |= {"label_count": 0, "prompt_length": 0, "image": -1, "answer": 0, "n_choices": 0}
    rows = [write_shard(folder / "train-00000.arrow", ROW_SCHEMA, [row], ROW_BATCH)]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind="scienceqa",
        created_by="benchmarks/features.py",
        splits={"train": SplitEntry(files=rows, rows=1, images=0, records=1, lengths=LengthCounts(whole=1))},
        images=ImageEntry(size=size, resize=config.data.image_resize, files=files, rows=images),
        tokenizer=TokenizerEntry(sha256="", vocab_size=32_000, bos=1, eos=2),
        prefix_image=[],
        prefix_text=[],
        prompt=PromptSettings.of(config),
    )
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return folder


def bare(tower: VisionTower, batches: list[torch.Tensor]) -> float:
    """Seconds of the forward passes alone."""
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            cls = tower(batch)
    if cls.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def job(shards: Path, clip: Path, config: RunConfig, device: str) -> float:
    """Seconds of the whole job. Removes its files afterwards."""
    began = time.perf_counter()
    planned = features.plan(shards, clip, config)
    features.extract(planned, device)
    features.finish(planned)
    seconds = time.perf_counter() - began
    for path in planned.files():
        path.unlink()
    write_json(shards / MANIFEST_NAME, planned.manifest.model_dump(mode="json"))
    return seconds


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1, help="Random images.")] = 256,
    recipe: Annotated[
        str, typer.Option(help="The recipe with the ViT; that must have no adapters.")
    ] = "ablation-vision",
    folder: Annotated[Path | None, typer.Option(help="Where to write; removed afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure feature extraction."""
    config = load_recipe(recipe, overrides or [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parent = Path(tempfile.mkdtemp(dir=folder))
    try:
        torch.manual_seed(0)
        clip = write_clip(parent / "clip.safetensors", config)
        shards = write_images(parent / "shards", config, images)
        tower = VisionTower(config.model.vision, None, STORAGES[config.model.frozen_dtype])
        load_clip(tower, clip)
        tower.to(device).eval()
        size = config.model.vision.image_size
        sizes = [min(features.BATCH, images - start) for start in range(0, images, features.BATCH)]
        batches = [torch.randn(n, 3, size, size, device=device) for n in sizes]
        bare(tower, batches[:1])
        turns = [(bare(tower, batches), job(shards, clip, config, device)) for _ in range(ROUNDS)]
    finally:
        shutil.rmtree(parent)
    alone, whole = (images / statistics.median(seconds) for seconds in zip(*turns, strict=True))
    result = {
        "images": images,
        "batch": features.BATCH,
        "recipe": recipe,
        "dtype": config.model.frozen_dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "bare_images_per_second": alone,
        "job_images_per_second": whole,
        "ratio": whole / alone,
        "passed": whole / alone >= LIMIT,
    }
    title = f"{images} images, ViT of {recipe}, {result['dtype']}, batches of {features.BATCH}, {device}"
    rows = [["bare forward pass", f"{alone:.2f}", "1.00"]]
    rows += [["lavin-ds prep features", f"{whole:.2f}", f"{whole / alone:.2f} (at least {LIMIT})"]]
    show(result, as_json, table(title, ("", "images/s", "ratio"), rows))
    raise typer.Exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    typer.run(main)
