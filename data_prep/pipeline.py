"""From a source of records to a shard directory, in three passes of tasks that workers do side by side.

    check    every record looked into, every image file hashed   -> the distinct images, in the order of the records
    images   the distinct images decoded and resized             -> images-*.arrow, and a row for each image
    rows     the texts tokenised                                 -> SPLIT-*.arrow

A task is a fixed range of records or images and writes one whole file, so the bytes depend on the input alone, and a
job that was killed goes on behind the last whole file. Memory holds the list of records, and of an image its hash
and path; pixels and tokens only as much as an Arrow batch.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

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
from lavin_ds.data_prep.pool import Pool
from lavin_ds.data_prep.records import Listing, Offender, Source, in_words
from lavin_ds.data_prep.worker import Job, Task
from lavin_ds.data_prep.workspace import Workspace, open_workspace
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_atomically, write_json

RECORDS_PER_FILE = 2048  # about 3 MB
IMAGES_PER_FILE = 512  # about 80 MB at 224 pixels
SHOWN = 20  # offenders named in an error

Progress = Callable[[str, int, int], None]  # the pass, and how much of how much is done


@dataclass(frozen=True)
class PrepReport:
    """What a job made. `median_positions` and `max_positions`, by split, are of samples as laid out for
    training, with the modality token: what data.max_length bounds.

    `resumed`: files that an earlier, killed run of the job had finished.
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

    With `on_error` "skip" bad records are left out, counted and written to rejects.jsonl. A job that was killed, or
    ended by a full disk, is finished by the same call; `restart` begins anew.

    Raises:
        UserError: the source's files are missing or malformed, the tokenizer has more pieces than the recipe's model,
            `out` is in the way, the disk is full, or, with `on_error` "fail", any record is bad: the first 20 are
            named.
    """
    started = time.monotonic()
    model = Tokenizer(tokenizer)
    if model.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"Tokenizer {tokenizer} has {model.vocab_size} pieces and the recipe's model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}: give the tokenizer of that base, or its recipe."
        )
    settings = PromptSettings.of(config)
    if settings.format not in source.formats:
        raise UserError(
            f"The recipe's data.prompt_format is {settings.format}, and that of {source.kind} is "
            f"{in_words(source.formats)}: give a recipe such as {source.recipe}."
        )
    listing = source.listing(settings)
    _check_names(listing)
    vision = config.model.vision
    inputs = _inputs(source, listing, model, config)
    with open_workspace(Path(out), inputs, overwrite, restart) as workspace:
        image_size = vision.image_size if vision else None
        job = Job(source, Path(tokenizer), settings, image_size, config.data.image_resize, workspace.shards)
        resumed = sum(bool(result.get("file")) for result in workspace.done.values())
        with Pool(job, workers) as pool:
            run = _Run(listing, job, workspace, pool, on_progress or (lambda stage, done, total: None))
            try:
                run.check()
                run.write_images()
                run.write_rows()
                run.judge(on_error)
            except _BadData:
                workspace.discard()  # the same files, mended, are other input
                raise
        manifest = _manifest(run, model)
        _write_descriptions(workspace.shards, run, model, manifest)
        workspace.publish()
    return PrepReport(
        out=Path(out),
        manifest=manifest,
        median_positions={split: _median(counts) for split, counts in run.lengths.items()},
        max_positions={split: max(counts, default=0) for split, counts in run.lengths.items()},
        bytes=sum(file.bytes for file in manifest.all_files()),
        seconds=time.monotonic() - started,
        resumed=resumed,
    )


class _BadData(UserError):
    """The records, not the machine, are why a job stopped."""


@dataclass
class _Run:
    """The three passes, and what is known after each. Numbers of records count from the start of their split."""

    listing: Listing
    job: Job
    workspace: Workspace
    pool: Pool
    on_progress: Progress
    image_files: list[FileEntry] = field(default_factory=list)
    splits: dict[str, SplitEntry] = field(default_factory=dict)
    lengths: dict[str, Counter] = field(default_factory=dict)  # by split: positions as laid out -> rows
    _images: list[tuple[str, str]] = field(default_factory=list)  # SHA-256 and path of the distinct ones
    _image_of: dict[str, array] = field(default_factory=dict)  # by split and record: a place in _images, or -1
    _image_rows: array = field(default_factory=lambda: array("i"))  # by place in _images: a row of the image table
    _offenders: list[tuple[int, int, Offender]] = field(default_factory=list)  # with numbers of split and record
    _too_long: list[tuple[int, int, Offender]] = field(default_factory=list)  # not trained on, no fault of theirs

    def check(self) -> None:
        ranges = [
            (split, start, part)
            for split, listed in self.listing.splits.items()
            for start, part in _parts(listed, RECORDS_PER_FILE)
        ]
        tasks = [Task(f"check {split} {start}", "check", (part,), len(part)) for split, start, part in ranges]
        places: dict[str, int] = {}
        self._image_of = {split: array("i") for split in self.listing.splits}
        for (split, start, _), result in zip(ranges, self._do("check", tasks), strict=True):
            for digest, path in result["images"]:
                if digest not in places:
                    places[digest] = len(self._images)
                    self._images.append((digest, path))
            own = [places[digest] for digest, _ in result["images"]]
            self._image_of[split].extend(own[place] if place >= 0 else -1 for place in result["records"])
            for i, key, reason in result["faults"]:
                self._offend(split, start + i, key, reason)

    def write_images(self) -> None:
        ranges = list(_parts(self._images, IMAGES_PER_FILE))
        tasks = []
        for number, (_, part) in enumerate(ranges):
            name = f"images-{number:05d}.arrow"
            tasks.append(Task(name, "write_images", (name, part), len(part)))
        bad: dict[int, str] = {}
        for (start, _), result in zip(ranges, self._do("images", tasks), strict=True):
            bad |= {start + i: reason for i, reason in result["faults"]}
            self.image_files += _entries(result)
        row = 0
        for place in range(len(self._images)):
            self._image_rows.append(-1 if place in bad else row)
            row += place not in bad
        if bad:
            for split, places in self._image_of.items():
                for number, place in enumerate(places):
                    if place in bad:
                        self._offend(split, number, "image", f"{self._image_path(split, number)} {bad[place]}")

    def write_rows(self) -> None:
        tasks, ranges = [], []
        for split, listed in self.listing.splits.items():
            bad = self._bad_records(split)
            places = self._image_of[split]
            for file, (start, part) in enumerate(_parts(listed, RECORDS_PER_FILE)):
                good = array("i", (number for number in range(start, start + len(part)) if number not in bad))
                rows = array("i", (self._image_rows[places[number]] if places[number] >= 0 else -1 for number in good))
                name = f"{split}-{file:05d}.arrow"
                tasks.append(Task(name, "write_rows", (name, [listed[number] for number in good], rows), len(part)))
                ranges.append((split, good))
        results: dict[str, list[dict]] = {split: [] for split in self.listing.splits}
        for (split, good), result in zip(ranges, self._do("rows", tasks), strict=True):
            results[split].append(result)
            for i, text_id, reason in result["too_long"]:
                refused = self.job.settings.overlength == "error"
                self._offend(split, good[i], "length", reason, text_id, None if refused else self._too_long)
        for split, parts in results.items():
            self.splits[split] = self._entry(split, parts)

    def judge(self, on_error: str) -> None:
        """UserError if there were bad records and they were not to be skipped, or if a split is empty without them."""
        if on_error == "fail" and self._offenders:
            raise _BadData(self._offence())
        for split, entry in self.splits.items():
            if not entry.rows:
                raise _BadData(f"No record of split '{split}' of {self.job.source.where} is left: {self._offence()}")

    def rejects(self) -> list[Offender]:
        """Everything left out or not trained on, in the order of the records."""
        return _in_order(self._offenders + self._too_long)

    def _do(self, stage: str, tasks: list[Task]) -> Iterator[dict]:
        """Does what no earlier run finished, and yields the results of all tasks in their order, keeping none."""
        results = self.workspace.done
        done, total = sum(task.size for task in tasks if task.name in results), sum(task.size for task in tasks)
        todo = [task for task in tasks if task.name not in results]
        names = deque(task.name for task in tasks)
        self.on_progress(stage, done, total)
        for task, result in self.pool.run(todo):
            self.workspace.record(task.name, result)
            done += task.size
            self.on_progress(stage, done, total)
            while names and names[0] in results:
                yield results.pop(names.popleft())
        while names:
            yield results.pop(names.popleft())

    def _offend(self, split: str, number: int, key: str, reason: str, id: str | None = None, where=None) -> None:
        id = id or self.listing.splits[split][number].id
        offender = Offender(split, id.encode("utf-8", "replace").decode(), key, reason)
        where = self._offenders if where is None else where
        where.append((list(self.listing.splits).index(split), number, offender))

    def _bad_records(self, split: str) -> set[int]:
        order = list(self.listing.splits).index(split)
        return {number for own, number, _ in self._offenders if own == order}

    def _image_path(self, split: str, number: int) -> Path:
        return self.job.source.root / self.job.source.read(self.listing.splits[split][number], self.job.settings).image

    def _entry(self, split: str, results: list[dict]) -> SplitEntry:
        outcomes: Counter = Counter()
        self.lengths[split] = Counter()
        for result in results:
            outcomes.update(result["outcomes"])
            self.lengths[split].update(dict(map(tuple, result["lengths"])))
        files = [entry for result in results for entry in _entries(result)]
        return SplitEntry(
            files=files,
            rows=sum(file.rows for file in files),
            images=sum(result["images"] for result in results),
            records=len(self.listing.splits[split]),
            lengths=LengthCounts(**outcomes),
            rejected=len(self._bad_records(split)),
            longest_text=max(result["longest"][0] for result in results),
            longest_image=max(result["longest"][1] for result in results),
        )

    def _offence(self) -> str:
        """Names offenders up to SHOWN, a line each, then how many more, then the remedy."""
        offenders = _in_order(self._offenders)
        lines = [str(offender) for offender in offenders[:SHOWN]] or ["and the good ones are over the length limit"]
        if len(offenders) > SHOWN:
            lines.append(f"and {len(offenders) - SHOWN:,} more")
        remedy = "Mend them or leave them out with --on-error skip"
        if any(offender.key == "length" for offender in offenders):
            remedy += ", and for their length raise data.max_length or set data.overlength to shorten or drop"
        if len(offenders) > 1 and all(o.key == "image" and o.reason.endswith("is missing") for o in offenders):
            remedy += f"; or do their paths start from another folder than {self.job.source.root}?"
        s = "s" * (len(offenders) != 1)
        listed = "".join(f"\n  {line}" for line in lines)
        end = "" if remedy.endswith("?") else "."
        return f"{len(offenders):,} bad record{s} in {self.job.source.where}:{listed}\n{remedy}{end}"


def _check_names(listing: Listing) -> None:
    """A split's name begins the names of its files."""
    for split in listing.splits:
        if not re.fullmatch(r"[A-Za-z0-9_]+", split) or split == "images":
            raise UserError(f"A split cannot be named '{split}': give it letters, digits and _, and not 'images'.")


def _inputs(source: Source, listing: Listing, tokenizer: Tokenizer, config: RunConfig) -> dict[str, str]:
    """Everything that decides what the shards will hold: a job goes on only where these are the same."""
    vision = config.model.vision
    return {
        "lavin_ds": __version__,
        "schema_version": str(SCHEMA_VERSION),
        "kind": source.kind,
        "data": str(source.root.resolve()),
        **{f"SHA-256 of {name}": digest for name, digest in listing.sha256.items()},
        "splits": ",".join(listing.splits),
        "SHA-256 of the tokenizer": tokenizer.sha256,
        "BOS and EOS": f"{tokenizer.bos_id}, {tokenizer.eos_id}",
        **{f"prompt {key}": str(value) for key, value in PromptSettings.of(config).model_dump().items()},
        "image size": str(vision.image_size) if vision else "none",
        "data.image_resize": config.data.image_resize,
        "records and images a file": f"{RECORDS_PER_FILE}, {IMAGES_PER_FILE}",
    }


def _manifest(run: _Run, tokenizer: Tokenizer) -> Manifest:
    job, frame = run.job, Frame.of(tokenizer)
    images = None
    if job.image_size:
        rows = sum(file.rows for file in run.image_files)
        images = ImageEntry(size=job.image_size, resize=job.image_resize, files=run.image_files, rows=rows)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        kind=job.source.kind,
        created_by=f"lavin-ds {__version__}",
        splits=run.splits,
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


def _write_descriptions(folder: Path, run: _Run, tokenizer: Tokenizer, manifest: Manifest) -> None:
    """What stands beside the shards: the tokenizer, the rejects, and last the manifest."""
    shutil.copyfile(tokenizer.path, folder / tokenizer.shard_name)
    sync(folder / tokenizer.shard_name)
    if rejects := run.rejects():
        lines = [json.dumps(asdict(reject), ensure_ascii=True) + "\n" for reject in rejects]
        write_atomically(folder / REJECTS_NAME, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def _parts(items: list, size: int) -> Iterator[tuple[int, list]]:
    """Slices of `size` items, each with the number of its first."""
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def _entries(result: dict) -> list[FileEntry]:
    return [FileEntry(**result["file"])] if result["file"] else []


def _in_order(offenders: list[tuple[int, int, Offender]]) -> list[Offender]:
    return [offender for _, _, offender in sorted(offenders, key=lambda item: item[:2])]


def _median(counts: Counter) -> int:
    """The lower median of values given by how often each occurs; 0 of none."""
    left = (counts.total() - 1) // 2
    for value in sorted(counts):
        left -= counts[value]
        if left < 0:
            return value
    return 0
