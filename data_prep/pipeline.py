"""From a source of records to a shard directory, in three passes.

    check         every record is checked, every image file hashed   -> a catalogue of records and distinct images
    write_images  the distinct images are decoded and resized        -> images-*.arrow
    write_rows    the texts are tokenised                            -> SPLIT-*.arrow

A pass is a list of tasks that worker processes do in parallel. A task covers a fixed range of records or images and
writes one whole file. So the bytes depend on the input alone, and a job that was killed continues after its last whole
file. Memory holds the list of records, and the hash and path of each image. It holds pixels and tokens for one Arrow
batch at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lavin_ds import __version__
from lavin_ds.config import RunConfig
from lavin_ds.data.layout import Frame
from lavin_ds.data.schema import (
    MANIFEST_NAME,
    REJECTS_NAME,
    SCHEMA_VERSION,
    FileEntry,
    ImageEntry,
    LengthCounts,
    Manifest,
    PromptSettings,
    SplitEntry,
    TokenizerEntry,
)
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep.catalogue import Catalogue
from lavin_ds.data_prep.records import Listing, Source, in_words
from lavin_ds.data_prep.runner import Progress, Runner
from lavin_ds.data_prep.worker import Job, Task
from lavin_ds.data_prep.workspace import open_workspace
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_atomically, write_json

RECORDS_PER_FILE = 2048  # about 3 MB
IMAGES_PER_FILE = 512  # about 80 MB at 224 pixels


@dataclass(frozen=True)
class PrepReport:
    """The result of a job.

    median_positions, max_positions: by split, of samples laid out for training, with the modality token.
    data.max_length is their bound. resumed: the number of files that an earlier, killed run had finished.
    """

    out: Path
    manifest: Manifest
    median_positions: dict[str, int]
    max_positions: dict[str, int]
    bytes: int
    seconds: float
    resumed: int


def prepare(
    source: Source,
    tokenizer: Path,
    out: Path,
    config: RunConfig,
    on_error: Literal["fail", "skip"] = "fail",
    workers: int = 1,
    overwrite: bool = False,
    restart: bool = False,
    on_progress: Progress | None = None,
) -> PrepReport:
    """Tokenises every record and stores every image once; the same input gives the same bytes.

    With `on_error` "skip", bad records are left out, counted and written to rejects.jsonl. If a job was killed or the
    disk was full, the same call finishes it; `restart` starts over.

    Raises:
        UserError: the recipe is for other data, the source's files are missing or malformed, the tokenizer has more
            pieces than the recipe's model, `out` exists already, the disk is full, or (with `on_error` "fail") a
            record is bad. The error names the first 20 bad records.
    """
    started = time.monotonic()
    model, settings, vision = Tokenizer(tokenizer), PromptSettings.of(config), config.model.vision
    _check_recipe(source, model, config)
    listing = source.listing(settings)
    _check_names(listing)
    inputs = _inputs(source, listing, model, config)
    with open_workspace(Path(out), inputs, overwrite, restart) as workspace:
        image_size = vision.image_size if vision else None
        job = Job(source, Path(tokenizer), settings, image_size, config.data.image_resize, workspace.shards)
        resumed = sum(bool(result.get("file")) for result in workspace.done.values())
        with Runner(job, workspace, workers, on_progress) as runner:
            catalogue = check(source, settings, listing, runner)
            images = write_images(catalogue, runner)
            splits, lengths = write_rows(catalogue, runner)
        if on_error == "fail" and catalogue.bad():
            workspace.discard()  # once the records are corrected, the input is another one
            raise UserError(catalogue.complaint())
        for split, entry in splits.items():
            if not entry.rows:
                workspace.discard()
                raise UserError(f"No record of split '{split}' of {source.where} is left: {catalogue.complaint()}")
        manifest = _manifest(job, model, splits, images)
        _write_descriptions(workspace.shards, catalogue, model, manifest)
        workspace.publish()
    return PrepReport(
        out=Path(out),
        manifest=manifest,
        median_positions={split: _median(counts) for split, counts in lengths.items()},
        max_positions={split: max(counts, default=0) for split, counts in lengths.items()},
        bytes=sum(file.bytes for file in manifest.all_files()),
        seconds=time.monotonic() - started,
        resumed=resumed,
    )


def check(source: Source, prompt: PromptSettings, listing: Listing, runner: Runner) -> Catalogue:
    """Checks every record and hashes every image. The catalogue has the distinct images and the bad records."""
    catalogue = Catalogue(source, prompt, listing)
    ranges = list(_ranges(listing))
    tasks = [Task(f"check {split} {start}", "check", (part,), len(part)) for split, start, part in ranges]
    places: dict[str, int] = {}  # by SHA-256
    catalogue.image_of = {split: array("i") for split in listing.splits}
    for (split, start, _), result in zip(ranges, runner.run("check", tasks), strict=True):
        for digest, path in result["images"]:
            if digest not in places:
                places[digest] = len(catalogue.images)
                catalogue.images.append((digest, path))
        own = [places[digest] for digest, _ in result["images"]]
        catalogue.image_of[split].extend(own[place] if place >= 0 else -1 for place in result["records"])
        for i, key, reason in result["faults"]:
            catalogue.reject(split, start + i, key, reason)
    return catalogue


def write_images(catalogue: Catalogue, runner: Runner) -> list[FileEntry]:
    """Writes the distinct images that can be decoded, and notes the row of each in the image table."""
    ranges = list(_parts(catalogue.images, IMAGES_PER_FILE))
    names = [f"images-{number:05d}.arrow" for number in range(len(ranges))]
    tasks = [Task(name, "write_images", (name, part), len(part)) for name, (_, part) in zip(names, ranges, strict=True)]
    files: list[FileEntry] = []
    bad: dict[int, str] = {}
    for (start, _), result in zip(ranges, runner.run("images", tasks), strict=True):
        bad |= {start + i: reason for i, reason in result["faults"]}
        files += _entries(result)
    catalogue.number_images(bad)
    return files


def write_rows(catalogue: Catalogue, runner: Runner) -> tuple[dict[str, SplitEntry], dict[str, Counter]]:
    """Writes the samples of all good records; returns the splits, and by split the number of samples of each length.

    A length counts the positions of a sample laid out for training.
    """
    tasks, ranges = [], []
    for split, start, part in _ranges(catalogue.listing):
        name = f"{split}-{start // RECORDS_PER_FILE:05d}.arrow"
        good = catalogue.good(split, range(start, start + len(part)))
        rows = array("i", (catalogue.image_row(split, number) for number in good))
        tasks.append(Task(name, "write_rows", (name, [part[number - start] for number in good], rows), len(part)))
        ranges.append((split, good))
    results: dict[str, list[dict]] = {split: [] for split in catalogue.listing.splits}
    for (split, good), result in zip(ranges, runner.run("rows", tasks), strict=True):
        results[split].append(result)
        for i, text_id, reason in result["too_long"]:
            refused = catalogue.prompt.overlength == "error"
            note = catalogue.reject if refused else catalogue.note_untrained
            note(split, good[i], "length", reason, text_id)
    splits = {split: _split_entry(split, parts, catalogue) for split, parts in results.items()}
    return splits, {split: _added(parts, "lengths") for split, parts in results.items()}


def _check_recipe(source: Source, tokenizer: Tokenizer, config: RunConfig) -> None:
    if config.data.prompt_format not in source.formats:
        raise UserError(
            f"The recipe's data.prompt_format is {config.data.prompt_format}, but {source.kind} data needs "
            f"{in_words(source.formats)}: give a recipe such as {source.recipe}."
        )
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"Tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, but the recipe's model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}: give the tokenizer of the recipe's base, or another recipe."
        )


def _check_names(listing: Listing) -> None:
    """Refuses a split's name that cannot begin the names of its files."""
    for split in listing.splits:
        if not re.fullmatch(r"[A-Za-z0-9_]+", split) or split == "images":
            raise UserError(f"A split cannot be named '{split}': use letters, digits and _, but not the name 'images'.")


def _inputs(source: Source, listing: Listing, tokenizer: Tokenizer, config: RunConfig) -> dict[str, str]:
    """Everything that the shards' content depends on. An unfinished job continues only if all of it is the same."""
    vision = config.model.vision
    return {
        "lavin_ds": __version__,
        "schema_version": str(SCHEMA_VERSION),
        "kind": source.kind,
        **{f"--{option.name}": _option(getattr(source, option.name)) for option in fields(source)},
        **{f"SHA-256 of {name}": digest for name, digest in listing.sha256.items()},
        "splits": ",".join(listing.splits),
        "SHA-256 of the tokenizer": tokenizer.sha256,
        "BOS and EOS": f"{tokenizer.bos_id}, {tokenizer.eos_id}",
        **{f"prompt {key}": str(value) for key, value in PromptSettings.of(config).model_dump().items()},
        "image size": str(vision.image_size) if vision else "none",
        "data.image_resize": config.data.image_resize,
        "records and images per file": f"{RECORDS_PER_FILE}, {IMAGES_PER_FILE}",
    }


def _option(value: Any) -> str:
    return str(value.resolve() if isinstance(value, Path) else value)


def _split_entry(split: str, results: list[dict], catalogue: Catalogue) -> SplitEntry:
    files = [entry for result in results for entry in _entries(result)]
    return SplitEntry(
        files=files,
        rows=sum(file.rows for file in files),
        images=sum(result["images"] for result in results),
        records=len(catalogue.listing.splits[split]),
        lengths=LengthCounts(**_added(results, "outcomes")),
        rejected=catalogue.rejected(split),
        longest_text=max(result["longest"][0] for result in results),
        longest_image=max(result["longest"][1] for result in results),
    )


def _manifest(job: Job, tokenizer: Tokenizer, splits: dict[str, SplitEntry], files: list[FileEntry]) -> Manifest:
    frame, images = Frame.of(tokenizer), None
    if job.image_size:
        rows = sum(file.rows for file in files)
        images = ImageEntry(size=job.image_size, resize=job.image_resize, files=files, rows=rows)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        kind=job.source.kind,
        created_by=f"lavin-ds {__version__}",
        splits=splits,
        images=images,
        tokenizer=TokenizerEntry(
            file=tokenizer.shard_name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
        ),
        prefix_image=list(frame.prefix_image),
        prefix_text=list(frame.prefix_text),
        prompt=job.settings,
    )


def _write_descriptions(folder: Path, catalogue: Catalogue, tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Writes the files beside the shards: the tokenizer, the list of what was left out, and last the manifest."""
    shutil.copyfile(tokenizer.path, folder / tokenizer.shard_name)
    sync(folder / tokenizer.shard_name)
    if left_out := catalogue.left_out():
        lines = [json.dumps(asdict(one), ensure_ascii=True) + "\n" for one in left_out]
        write_atomically(folder / REJECTS_NAME, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def _ranges(listing: Listing) -> Iterator[tuple[str, int, list]]:
    """For each file of rows: the split, the number of the first record, and the records."""
    for split, listed in listing.splits.items():
        for start, part in _parts(listed, RECORDS_PER_FILE):
            yield split, start, part


def _parts(items: list, size: int) -> Iterator[tuple[int, list]]:
    """Slices of `size` items, each with the index of its first item."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def _entries(result: dict) -> list[FileEntry]:
    return [FileEntry(**result["file"])] if result["file"] else []


def _added(results: list[dict], key: str) -> Counter:
    """The sum of the counts that each result holds as (name, count) pairs."""
    counts: Counter = Counter()
    for result in results:
        counts.update(dict(map(tuple, result[key])))
    return counts


def _median(counts: Counter) -> int:
    """The lower median of values, given how often each occurs; 0 if there are none."""
    left = (counts.total() - 1) // 2
    for value in sorted(counts):
        left -= counts[value]
        if left < 0:
            return value
    return 0
