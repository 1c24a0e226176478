"""The tasks of prep: check records, write a file of images, write a file of rows.

The result of a task consists of plain JSON values, because it is written to the progress file. The file that a task
writes depends on the task alone, so the number of workers and the order of tasks do not change a byte.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from lavin_ds.config import ImageResize
from lavin_ds.data import images as pictures
from lavin_ds.data.layout import Frame, laid_out_lengths
from lavin_ds.data.samples import Sample, make_samples
from lavin_ds.data.schema import IMAGE_SCHEMA, ROW_SCHEMA, FileEntry, PromptSettings
from lavin_ds.data.shards import IMAGE_BATCH, ROW_BATCH, write_shard
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep.reading import read_image_file
from lavin_ds.data_prep.records import Listed, Record, Refused, Source, Text
from lavin_ds.errors import UserError

CHUNK = 256  # records tokenised at a time


@dataclass(frozen=True)
class Task:
    """A method of Worker and its arguments. `name` is its key in the progress file, `size` its records or images."""

    name: str
    method: Literal["check", "write_images", "write_rows"]
    arguments: tuple
    size: int


@dataclass(frozen=True)
class Job:
    """The settings of all tasks. `image_size` is None for a recipe without vision, which reads no image."""

    source: Source
    tokenizer: Path
    settings: PromptSettings
    image_size: int | None
    image_resize: ImageResize
    shards: Path


@dataclass
class Tally:
    """Counts over the rows of a file. `too_long` has the record, text id and reason of each sample not trained on."""

    outcomes: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)  # positions as laid out for training -> rows
    longest: list[int] = field(default_factory=lambda: [0, 0])  # own tokens, of rows without and with an image
    images: int = 0
    too_long: list[tuple[int, str, str]] = field(default_factory=list)


class Worker:
    def __init__(self, job: Job):
        self.job = job

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.job.tokenizer)

    @cached_property
    def frame(self) -> Frame:
        return Frame.of(self.tokenizer)

    def do(self, task: Task) -> dict:
        return getattr(self, task.method)(*task.arguments)

    def check(self, listed: list[Listed]) -> dict:
        """Checks records and hashes the files of their images.

        Returns:
            images: (SHA-256, path) of each distinct image, in the order of the records.
            records: for each record, the place of its image in `images`, or -1.
            faults: (place, key, reason) of each bad record.
        """
        images: dict[str, str] = {}
        places: dict[str, int] = {}
        records, faults = [], []
        for i, one in enumerate(listed):
            place = -1
            try:
                if one.fault:
                    raise one.fault
                record = self.job.source.read(one, self.job.settings)
                if record.image and self.job.image_size:
                    digest = hashlib.sha256(read_image_file(self.job.source.root / record.image)).hexdigest()
                    images.setdefault(digest, record.image)
                    place = places.setdefault(digest, len(places))
            except Refused as refused:
                faults.append([i, refused.key, refused.reason])
            records.append(place)
        return {"images": list(images.items()), "records": records, "faults": faults}

    def write_images(self, name: str, images: list[tuple[str, str]]) -> dict:
        """Decodes and resizes images, given as (SHA-256, path). Returns the `file`, and `faults` as (place, reason)."""
        faults: list[tuple[int, str]] = []
        entry = write_shard(self.job.shards / name, IMAGE_SCHEMA, self._image_rows(images, faults), IMAGE_BATCH)
        return {"file": _dumped(entry), "faults": faults}

    def write_rows(self, name: str, listed: list[Listed], image_rows: Sequence[int]) -> dict:
        """Tokenises records; `image_rows` are their rows in the image table, or -1. Returns `file` and Tally."""
        tally = Tally()
        rows = self._sample_rows(listed, image_rows, tally)
        entry = write_shard(self.job.shards / name, ROW_SCHEMA, rows, ROW_BATCH)
        return {
            "file": _dumped(entry),
            "outcomes": sorted(tally.outcomes.items()),
            "lengths": sorted(tally.lengths.items()),
            "longest": tally.longest,
            "images": tally.images,
            "too_long": tally.too_long,
        }

    def _image_rows(self, images: list[tuple[str, str]], faults: list[tuple[int, str]]) -> Iterator[dict]:
        for i, (digest, path) in enumerate(images):
            try:
                content = read_image_file(self.job.source.root / path)
            except Refused as refused:
                raise UserError(_changed(path, refused.reason)) from None
            if hashlib.sha256(content).hexdigest() != digest:
                raise UserError(_changed(path, "its content differs"))
            try:
                picture = pictures.decode(content)
            except pictures.ImageError as error:
                faults.append((i, str(error)))
                continue
            pixels = pictures.resize(picture, self.job.image_size, self.job.image_resize)
            yield {"id": digest, "source": path, "pixels": pixels.tobytes()}

    def _sample_rows(self, listed: list[Listed], image_rows: Sequence[int], tally: Tally) -> Iterator[dict]:
        settings, frame = self.job.settings, self.frame
        for start in range(0, len(listed), CHUNK):
            found: list[tuple[int, Record, Text]] = []
            for i in range(start, min(start + CHUNK, len(listed))):
                record = self.job.source.read(listed[i], settings)
                found += [(i, record, text) for text in record.texts]
            has_pixels = [image_rows[i] >= 0 for i, _, _ in found]
            samples = make_samples([text.turns for _, _, text in found], has_pixels, self.tokenizer, frame, settings)
            for (i, record, text), sample in zip(found, samples, strict=True):
                if sample.reason:
                    refused = settings.overlength == "error"
                    kept = "; its prompt is kept" if sample.token_ids and not refused else ""
                    tally.too_long.append((i, text.id, f"is {sample.reason}{kept}"))
                    if refused:
                        continue
                has = image_rows[i] >= 0
                tally.outcomes[sample.outcome] += 1
                if sample.token_ids:
                    n = len(sample.token_ids)
                    positions = 1 + int(laid_out_lengths(n, has, frame, settings.visual_tokens))  # 1: t_m
                    tally.lengths[positions] += 1
                    tally.longest[has] = max(tally.longest[has], n)
                    tally.images += has
                    yield _row(text, record, sample, image_rows[i])


def _row(text: Text, record: Record, sample: Sample, image: int) -> dict:
    return {
        "id": text.id,
        "token_ids": sample.token_ids,
        "label_spans": sample.label_spans,
        "label_count": sample.label_count,
        "prompt_length": sample.prompt_length,
        "prompt_ids": sample.prompt_ids,
        "image": image,
        "has_image": bool(record.image),
        "has_hint": text.has_hint,
        "answer": text.answer,
        "n_choices": text.n_choices,
        "subject": text.subject,
        "grade": text.grade,
        "references": text.references,
    }


def _dumped(entry: FileEntry | None) -> dict | None:
    return entry.model_dump() if entry else None


def _changed(path: str, reason: str) -> str:
    return f"The image {path} was changed while the job ran ({reason}): run the command again with --restart."
