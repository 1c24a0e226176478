"""Cached features: the rows that a frozen CLIP computes for every image, added to a shard directory.

    SHARDS/features-KEY-00000.arrow ...   one row per image, in the order of the image table

KEY is a hash of everything that the features depend on, and a file gets its name when it is complete. So a job that was
stopped skips the files that exist. The manifest lists the files last. Each file is computed in batches of its own, so
its bytes do not depend on the rank that computes it or on the number of ranks (on one kind of device and one version of
torch).

Dimensions: N images of a batch, S image side in pixels, F rows per image, W vision width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import (
    FEATURE_SCHEMA,
    MANIFEST_NAME,
    FeatureEntry,
    FileEntry,
    Manifest,
    check_images,
    load_manifest,
    normalisation,
)
from lavin_ds.data.shards import ShardReader, file_sha256, write_shard
from lavin_ds.errors import UserError
from lavin_ds.files import write_json
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.vision import VisionTower
from lavin_ds.weights.clip import check_clip, load_clip

FILE_ROWS = 256  # at most 6 MB of ViT-L/14's features; small enough to keep many ranks equally busy
BATCH = 32  # images per forward pass; part of KEY, because rounding may depend on it


@dataclass(frozen=True)
class FeatureJob:
    """A job that passed every check. `done` is True if the directory already has exactly these features."""

    directory: Path
    clip: Path
    config: RunConfig
    manifest: Manifest
    entry: FeatureEntry  # its files are filled in by `finish`
    key: str
    done: bool

    @property
    def images(self) -> int:
        return self.manifest.images.rows

    def files(self) -> list[Path]:
        count = math.ceil(self.images / FILE_ROWS)
        return [self.directory / f"features-{self.key}-{number:05d}.arrow" for number in range(count)]


def plan(directory: Path, clip: Path, config: RunConfig, overwrite: bool = False) -> FeatureJob:
    """Checks recipe, shards and CLIP file. The only thing it computes is the CLIP file's hash.

    Raises:
        UserError: the recipe has no vision, or has adapters in its ViT; the shards have no images, or images that do
            not match the recipe, or (without `overwrite`) features of another kind; the CLIP file does not fit the
            recipe.
    """
    vision, adapter = config.model.vision, config.model.vision_adapter
    if vision is None:
        raise UserError(f"Recipe {config.name} is text-only (it has no model.vision): there are no features to cache.")
    if adapter.kind != "none":
        raise UserError(
            f"Recipe {config.name} has adapters in its ViT (model.vision_adapter.kind {adapter.kind}). They change "
            "the features at every training step, so cached ones would be wrong. Train the recipe from pixels, or set "
            "model.vision_adapter.kind=none."
        )
    reader = _reader(directory)
    disagreements = check_images(reader.manifest, config)
    if disagreements:
        raise UserError(f"{directory} was not prepared for this recipe: " + "; ".join(disagreements) + ".")
    check_clip(clip, vision)
    entry = FeatureEntry(
        clip_sha256=file_sha256(clip),
        vision=vision,
        normalise=normalisation(config),
        computed_in=config.model.frozen_dtype,
        rows_per_image=vision.rows,
        width=vision.width,
        files=[],
        rows=reader.manifest.images.rows,
    )
    job = FeatureJob(
        directory=Path(directory),
        clip=clip,
        config=config,
        manifest=reader.manifest,
        entry=entry,
        key=_key(entry, reader.manifest),
        done=False,
    )
    present = reader.manifest.features
    if present is None:
        return job
    if [file.name for file in present.files] == [path.name for path in job.files()]:
        return replace(job, done=all(path.is_file() for path in job.files()))
    if not overwrite:
        raise UserError(
            f"{directory} has features of another kind (CLIP with SHA-256 {present.clip_sha256[:12]}.., "
            f"{present.rows_per_image} x {present.width}, computed in {present.computed_in}): replace them with "
            "--overwrite."
        )
    return job


def extract(
    job: FeatureJob,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Computes the files `rank`, `rank + ranks`, `rank + 2 * ranks` and so on, except those that exist.

    Returns the number of images computed. `on_progress(done, total)` counts the images of this rank.

    Raises:
        UserError: the disk is full or the directory cannot be written.
    """
    missing = [(n, path) for n, path in enumerate(job.files()) if n % ranks == rank and not path.is_file()]
    if not missing:
        return 0
    vision = job.config.model.vision
    tower = VisionTower(vision, None, STORAGES[job.config.model.frozen_dtype], compat=job.config.compat is not None)
    load_clip(tower, job.clip)
    tower.to(device).eval()
    reader = _reader(job.directory)
    total = sum(len(_file_rows(n, job.images)) for n, _ in missing)
    done = 0

    def features_of(rows: range, batches: Iterator[torch.Tensor]) -> Iterator[dict]:
        nonlocal done
        for start in range(0, len(rows), BATCH):
            features_NFW = features_of_images(tower, next(batches).to(device))
            done += len(features_NFW)
            if on_progress:
                on_progress(done, total)
            for i, features_FW in zip(rows[start:], features_NFW, strict=False):
                yield {"id": reader.image_origin(i)[0], "features": features_FW.ravel()}

    with ThreadPoolExecutor(1) as loader:
        batches = _prefetched(reader, [_file_rows(n, job.images) for n, _ in missing], loader)
        for number, path in missing:
            write_shard(path, FEATURE_SCHEMA, features_of(_file_rows(number, job.images), batches), BATCH)
    return done


def finish(job: FeatureJob) -> Manifest:
    """Lists the files in the manifest and removes those of other features. To be called when all ranks are done."""
    files = [
        FileEntry(
            name=path.name,
            rows=len(_file_rows(n, job.images)),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
        )
        for n, path in enumerate(job.files())
    ]
    entry = job.entry.model_copy(update={"files": files})
    manifest = job.manifest.model_copy(update={"features": entry})
    write_json(job.directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
    kept = {file.name for file in files}
    for path in [*job.directory.glob("features-*.arrow"), *job.directory.glob(".features-*")]:
        if path.name not in kept:
            path.unlink()
    return manifest


@torch.inference_mode()
def features_of_images(tower: VisionTower, images_NSSC: torch.Tensor) -> np.ndarray:
    """Features, float32 [N, F, W], of uint8 pixels [N, S, S, 3] on the tower's device."""
    return tower(images_NSSC).float().cpu().numpy()


def _prefetched(reader: ShardReader, files: list[range], loader: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
    """Batches of pixels, file by file. `loader` reads the next batch while the caller computes the current one."""

    def read(rows: range) -> torch.Tensor:
        return torch.from_numpy(np.stack([reader.image(i) for i in rows]))

    batches = [rows[start : start + BATCH] for rows in files for start in range(0, len(rows), BATCH)]
    ahead = loader.submit(read, batches[0])
    for rows in [*batches[1:], None]:
        images = ahead.result()
        if rows is not None:
            ahead = loader.submit(read, rows)
        yield images


def _file_rows(number: int, images: int) -> range:
    return range(number * FILE_ROWS, min((number + 1) * FILE_ROWS, images))


def _key(entry: FeatureEntry, manifest: Manifest) -> str:
    pixels = [file.sha256 for file in manifest.images.files]
    made_of = [entry.model_dump(mode="json", exclude={"files"}), pixels, BATCH, FILE_ROWS]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


def _reader(directory: Path) -> ShardReader:
    """A reader of the image table, which all splits share."""
    return ShardReader(directory, next(iter(load_manifest(directory).splits)))
