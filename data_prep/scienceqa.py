"""ScienceQA in its official folder layout, to a shard directory.

    DATA/problems.json               {id: record}
    DATA/pid_splits.json             {split: [id, ..]}
    DATA/captions.json               {"captions": {id: text}}, read only if the recipe has data.captions
    DATA/images/SPLIT/ID/image.png   SPLIT and the file's name as the record says

The output is put together in `.OUT.part` beside it and gets its name last: a job that fails leaves nothing,
and one that is killed leaves a folder that the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from lavin_ds import __version__
from lavin_ds.config import RunConfig
from lavin_ds.data import images as pictures
from lavin_ds.data.layout import Frame, laid_out_lengths
from lavin_ds.data.prompts import LETTERS, Question, check_format, context_of
from lavin_ds.data.samples import Sample, make_samples
from lavin_ds.data.schema import (
    IMAGE_SCHEMA,
    MANIFEST_NAME,
    REJECTS_NAME,
    ROW_SCHEMA,
    SCHEMA_VERSION,
    TOKENIZER_NAME,
    ImageEntry,
    LengthCounts,
    Manifest,
    PromptSettings,
    SplitEntry,
    TokenizerEntry,
)
from lavin_ds.data.shards import IMAGE_SIZES, ROW_SIZES, ShardWriter
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_json

DEFAULT_SPLITS = ("train", "val", "test")
CHUNK = 256  # records tokenised at a time
SHOWN = 20  # offenders named in an error
MAX_IMAGE_BYTES = 200_000_000

# Derived sets write null for a text that is not there.
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class Record(BaseModel):
    """The keys of an official record that are used; others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    question: str
    choices: list[str] = Field(min_length=2, max_length=len(LETTERS))
    answer: int = Field(ge=0)
    subject: str
    grade: str
    hint: Text = ""
    lecture: Text = ""
    solution: Text = ""
    image: Text = ""
    split: Text = ""

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _is_unicode(text):
                raise ValueError("it holds half a character (a lone surrogate)")
        return value

    @property
    def text(self) -> Question:
        return Question(self.question, tuple(self.choices), self.answer, self.hint, self.lecture, self.solution)


@dataclass(frozen=True)
class Offender:
    """A record that cannot be used as it is: where it is, which key of it, and why."""

    split: str
    id: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split} {self.id}: {self.key} {self.reason}"


@dataclass(frozen=True)
class PrepReport:
    """What a job made. `median_tokens` and `max_tokens` count ids as laid out for training, by split."""

    out: Path
    manifest: Manifest
    median_tokens: dict[str, int]
    max_tokens: dict[str, int]
    bytes: int
    seconds: float


def prepare_scienceqa(
    data: Path,
    tokenizer: Path,
    out: Path,
    config: RunConfig,
    splits: list[str] | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepReport:
    """Tokenises the splits (those of train, val and test that exist, if None) and stores every image once.

    `on_progress` is called with the number of records done and of all. With `on_error` "skip" bad records are
    left out, counted and written to rejects.jsonl.

    Raises:
        UserError: a file is missing or malformed, the tokenizer has more pieces than the recipe's model,
            `out` is in the way, or, with `on_error` "fail", any record is bad: the first 20 are named.
    """
    started = time.monotonic()
    settings = PromptSettings.of(config)
    check_format(settings.format)
    model = Tokenizer(tokenizer)
    if model.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"Tokenizer {tokenizer} has {model.vocab_size} pieces and the recipe's model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}: give the tokenizer of that base, or its recipe."
        )
    source = _Source.read(Path(data), splits, settings.captions)
    with _new_directory(Path(out), overwrite) as directory:
        job = _Job(source, model, config, settings, directory, on_error)
        entries = job.run(on_progress or (lambda done, total: None))
        manifest = job.finish(entries)
    tokens = job.token_counts
    return PrepReport(
        out=Path(out),
        manifest=manifest,
        median_tokens={split: int(np.median(counts)) for split, counts in tokens.items()},
        max_tokens={split: int(np.max(counts)) for split, counts in tokens.items()},
        bytes=sum(file.bytes for file in manifest.all_files()),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Source:
    """The official files as read; records are checked one by one later."""

    data: Path
    problems: dict
    splits: dict[str, list[str]]
    captions: dict[str, str]

    @classmethod
    def read(cls, data: Path, wanted: list[str] | None, with_captions: bool) -> _Source:
        problems = _read_json(data / "problems.json")
        ids = _read_json(data / "pid_splits.json")
        known = ", ".join(ids)
        chosen = list(dict.fromkeys(wanted or [name for name in DEFAULT_SPLITS if name in ids]))
        if not chosen:
            raise UserError(f"{data / 'pid_splits.json'} has no train, val or test: name others with --splits.")
        for split in chosen:
            if split not in ids:
                raise UserError(f"{data / 'pid_splits.json'} has no split '{split}': it has {known}.")
            if not isinstance(ids[split], list) or not all(isinstance(pid, str) for pid in ids[split]):
                raise UserError(f"{data / 'pid_splits.json'}: {split} must be a list of ids in quotes.")
            if not ids[split]:
                raise UserError(f"{data / 'pid_splits.json'}: {split} is empty: leave it out with --splits.")
        captions = {}
        if with_captions:
            captions = _read_json(data / "captions.json").get("captions")
            if not isinstance(captions, dict):
                raise UserError(f"{data / 'captions.json'} must hold a mapping of ids under the key captions.")
            for pid, caption in captions.items():
                if not isinstance(caption, str) or not _is_unicode(caption):
                    raise UserError(f"{data / 'captions.json'}: the caption of {pid} is not text: mend it.")
        return cls(data, problems, {split: ids[split] for split in chosen}, captions)

    @property
    def total(self) -> int:
        return sum(map(len, self.splits.values()))


@dataclass
class _Job:
    """One pass over all records. Bad ones are collected, so that the error names them all."""

    source: _Source
    tokenizer: Tokenizer
    config: RunConfig
    settings: PromptSettings
    directory: Path
    on_error: str
    offenders: list[Offender] = field(default_factory=list)
    too_long: list[Offender] = field(default_factory=list)  # not trained on, but no fault of the record
    token_counts: dict[str, list[int]] = field(default_factory=dict)
    _image_rows: dict[str, int] = field(default_factory=dict)  # hash of a file -> row of the image table

    def __post_init__(self):
        self.frame = Frame.of(self.tokenizer)
        self._images = ShardWriter(self.directory, "images", IMAGE_SCHEMA, *IMAGE_SIZES)

    def run(self, on_progress: Callable[[int, int], None]) -> dict[str, SplitEntry]:
        """Writes the rows of every split, and the images; UserError if bad records were not to be skipped."""
        done, entries = 0, {}
        with self._images:
            for split, ids in self.source.splits.items():
                tally = _Tally()
                with ShardWriter(self.directory, split, ROW_SCHEMA, *ROW_SIZES) as writer:
                    for chunk, chunk_ids in self._chunks(split, ids):
                        self._write(split, chunk, writer, tally)
                        done += chunk_ids
                        on_progress(done, self.source.total)
                self.token_counts[split] = tally.lengths
                entries[split] = tally.entry(writer, rejected=len(ids) - tally.records)
        if self.on_error == "fail" and self.offenders:
            raise UserError(self._offence())
        for split, entry in entries.items():
            if not entry.rows:
                raise UserError(f"No record of split '{split}' of {self.source.data} is left: {self._offence()}")
        return entries

    def finish(self, entries: dict[str, SplitEntry]) -> Manifest:
        """Writes what describes the shards: the tokenizer, the rejects, and last the manifest."""
        shutil.copyfile(self.tokenizer.path, self.directory / TOKENIZER_NAME)
        sync(self.directory / TOKENIZER_NAME)
        rejects = self.offenders + self.too_long
        if rejects:
            lines = [json.dumps(asdict(reject), ensure_ascii=True) + "\n" for reject in rejects]
            (self.directory / REJECTS_NAME).write_text("".join(lines), encoding="utf-8")
        vision, tokenizer = self.config.model.vision, self.tokenizer
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind="scienceqa",
            created_by=f"lavin-ds {__version__}",
            splits=entries,
            images=ImageEntry(
                size=vision.image_size,
                resize=self.config.data.image_resize,
                files=self._images.files,
                rows=self._images.rows,
            )
            if vision
            else None,
            tokenizer=TokenizerEntry(
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                bos=tokenizer.bos_id,
                eos=tokenizer.eos_id,
            ),
            prefix_image=list(self.frame.prefix_image),
            prefix_text=list(self.frame.prefix_text),
            prompt=self.settings,
        )
        write_json(self.directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
        return manifest

    def _chunks(self, split: str, ids: list[str]) -> Iterator[tuple[list[tuple[str, Record, int]], int]]:
        """Good records as (id, record, image row), CHUNK ids at a time, and how many ids that were."""
        seen: set[str] = set()
        for start in range(0, len(ids), CHUNK):
            chunk_ids = ids[start : start + CHUNK]
            checked = [self._check(split, pid, seen) for pid in chunk_ids]
            yield [item for item in checked if item], len(chunk_ids)

    def _check(self, split: str, pid: str, seen: set[str]) -> tuple[str, Record, int] | None:
        """A record with its image stored, or None and an offender."""
        try:
            record = _record(split, pid, self.source.problems, seen)
            return pid, record, self._store_image(split, pid, record)
        except _Refused as refused:
            key, reason = refused.args
            self.offenders.append(Offender(split, pid.encode("utf-8", "replace").decode(), key, reason))
            return None

    def _store_image(self, split: str, pid: str, record: Record) -> int:
        """Row of the image table, new or old; -1 without an image or for a recipe without vision."""
        if not record.image or not self.config.model.vision:
            return -1
        folder = record.split or split
        for key, part in (("id", pid), ("split", folder), ("image", record.image)):
            if not _is_plain_name(part):
                raise _Refused(key, f"'{part}' would leave the image folder")
        path = self.source.data / "images" / folder / pid / record.image
        content = _read_image(path)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._image_rows:
            try:
                picture = pictures.decode(content)
            except pictures.ImageError as error:
                raise _Refused("image", f"{path} {error}") from None
            pixels = pictures.resize(picture, self.config.model.vision.image_size, self.config.data.image_resize)
            source = path.relative_to(self.source.data).as_posix()
            row = {"id": digest, "source": source, "pixels": pixels.tobytes()}
            self._image_rows[digest] = self._images.add(row)
        return self._image_rows[digest]

    def _write(self, split: str, chunk: list[tuple[str, Record, int]], writer: ShardWriter, tally: _Tally) -> None:
        questions = [record.text for _, record, _ in chunk]
        captions = [self.source.captions.get(pid) for pid, _, _ in chunk]
        compat = self.settings.compat is not None
        contexts = [context_of(q, c, compat) for q, c in zip(questions, captions, strict=True)]
        has_image = [image >= 0 for _, _, image in chunk]
        samples = make_samples(questions, contexts, has_image, self.tokenizer, self.frame, self.settings)
        for (pid, record, image), sample in zip(chunk, samples, strict=True):
            if sample.reason:
                refused = self.settings.overlength == "error"
                kept = "" if refused or not sample.token_ids else "; kept for evaluation"
                offender = Offender(split, pid, "length", f"is {sample.reason}{kept}")
                (self.offenders if refused else self.too_long).append(offender)
                if refused:
                    continue
            tally.count(sample, image >= 0, self.frame, self.settings.visual_tokens)
            if sample.token_ids:
                writer.add(_row(pid, record, image, sample))

    def _offence(self) -> str:
        """One sentence that names offenders up to SHOWN, then how many more, then the remedy."""
        shown = "; ".join(map(str, self.offenders[:SHOWN])) or "and the good ones are over the length limit"
        more = f"; and {len(self.offenders) - SHOWN} more" if len(self.offenders) > SHOWN else ""
        remedy = "Mend them or leave them out with --on-error skip"
        if any(offender.key == "length" for offender in self.offenders):
            remedy += ", and for their length raise data.max_length or set data.overlength to shorten or drop"
        return f"{len(self.offenders)} bad records in {self.source.data}: {shown}{more}. {remedy}."


@dataclass
class _Tally:
    """What is counted over the rows of one split."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LengthCounts.model_fields, 0))
    lengths: list[int] = field(default_factory=list)
    longest: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # by has_image
    images: int = 0

    @property
    def records(self) -> int:
        return sum(self.outcomes.values())

    def count(self, sample: Sample, has_image: bool, frame: Frame, visual_tokens: int) -> None:
        self.outcomes[sample.outcome] += 1
        if sample.token_ids:
            n = len(sample.token_ids)
            self.lengths.append(int(laid_out_lengths(n, has_image, frame, visual_tokens)))
            self.longest[has_image] = max(self.longest[has_image], n)
            self.images += has_image

    def entry(self, writer: ShardWriter, rejected: int) -> SplitEntry:
        return SplitEntry(
            files=writer.files,
            rows=writer.rows,
            images=self.images,
            lengths=LengthCounts(**self.outcomes),
            rejected=rejected,
            longest_image=self.longest[True],
            longest_text=self.longest[False],
        )


class _Refused(Exception):
    """Why a record cannot be used: args are its key and the reason."""


def _record(split: str, pid: str, problems: dict, seen: set[str]) -> Record:
    """The checked record of an id; raises _Refused."""
    if pid in seen:
        raise _Refused("id", f"stands twice in pid_splits.json under {split}")
    seen.add(pid)
    if not _is_plain_name(pid):
        raise _Refused("id", "is no plain name: it would leave the image folder")
    if pid not in problems:
        raise _Refused("id", "is not in problems.json")
    try:
        record = Record.model_validate(problems[pid])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "record"
        reason = (
            "is missing"
            if problem["type"] == "missing"
            else f"is refused: {problem['msg'].removeprefix('Value error, ')}"
        )
        raise _Refused(key, reason) from None
    if record.answer >= len(record.choices):
        raise _Refused("answer", f"is {record.answer}, beyond its {len(record.choices)} choices")
    return record


def _is_unicode(text: str) -> bool:
    """JSON escapes can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_plain_name(name: str) -> bool:
    """Whether a string can only name something directly in a folder."""
    printable = name.isprintable() and not set(name) & set("/\\:")
    return printable and name not in ("", ".", "..")


def _read_image(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise _Refused("image", f"{path} is missing")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise _Refused("image", f"{path} is larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _Refused("image", f"{path} cannot be read ({error.strerror})") from None


def _row(pid: str, record: Record, image: int, sample: Sample) -> dict:
    return {
        "id": pid,
        "token_ids": sample.token_ids,
        "label_spans": sample.label_spans,
        "label_count": sample.label_count,
        "prompt_length": sample.prompt_length,
        "prompt_ids": sample.prompt_ids,
        "image": image,
        "has_image": bool(record.image),
        "has_hint": bool(record.hint.strip()),
        "answer": record.answer,
        "n_choices": len(record.choices),
        "subject": record.subject,
        "grade": record.grade,
    }


def _read_json(path: Path) -> dict:
    """A JSON mapping; UserError if it is missing, not UTF-8, not JSON, not a mapping, or says a key twice."""
    layout = "the official layout has problems.json, pid_splits.json, captions.json and images/"
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {layout}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}: save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download or write it again.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a JSON mapping: {layout}.")
    return raw


def _without_repeats(pairs: list[tuple]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{repeated}' stands twice in one mapping")
    return mapping


@contextmanager
def _new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes `out` if all goes well, and vanishes otherwise.

    With `overwrite` an older shard directory at `out` is replaced at the end; any other folder is left alone.
    """
    out = out.resolve()
    part, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("part", "old"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(f"{out} exists and is not empty: choose another --out, or replace it with --overwrite.")
        if not (out / MANIFEST_NAME).is_file():
            raise UserError(f"{out} is not a shard directory, so --overwrite leaves it alone: choose another --out.")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        sync(part)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old, ignore_errors=True)
        sync(out.parent)
    except OSError as error:
        where = error.filename or out
        raise UserError(f"{where} cannot be written ({error.strerror or error}): choose another --out.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
