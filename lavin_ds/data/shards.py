"""Arrow shards on disk: written whole or not at all, read through a memory map with any row at hand.

A file is Arrow IPC, uncompressed, so that a row is a slice of the mapped file: nothing is parsed or copied,
and ranks on one machine share the pages.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from lavin_ds.data.layout import Frame, laid_out_lengths
from lavin_ds.data.schema import FEATURE_SCHEMA, IMAGE_SCHEMA, ROW_SCHEMA, FileEntry, Manifest, load_manifest
from lavin_ds.errors import UserError
from lavin_ds.files import sync

# (rows a file, rows an Arrow batch): about 10 MB a file of tokens, 150 MB a file of 224-pixel images.
# A batch is what the writer holds in memory.
ROW_SIZES = (8192, 1024)
IMAGE_SIZES = (1024, 32)


class ShardWriter:
    """Streams rows into `PREFIX-00000.arrow`, ... of one schema; memory holds one Arrow batch.

    A file gets its name only when it is complete and on disk. Use as a context manager: leaving it normally
    finishes the last file, leaving it by an exception removes the unfinished one. `files` lists what was
    written.

    Raises:
        UserError: the disk is full or the directory cannot be written.
    """

    def __init__(self, directory: Path, prefix: str, schema: pa.Schema, file_rows: int, batch_rows: int):
        self.directory, self.prefix, self.schema = Path(directory), prefix, schema
        self.file_rows, self.batch_rows = file_rows, batch_rows
        self.files: list[FileEntry] = []
        self.rows = 0
        self._pending: list[dict] = []
        self._rows_in_file = 0
        self._sink = self._writer = self._temporary = None

    def add(self, row: dict) -> int:
        """Appends a row, one value a column; returns its index in the table."""
        self._pending.append(row)
        self.rows += 1
        in_file = self._rows_in_file + len(self._pending)
        if len(self._pending) == self.batch_rows or in_file == self.file_rows:
            self._guard(self._write_batch)
        if in_file == self.file_rows:
            self._guard(self._finish_file)
        return self.rows - 1

    def close(self) -> list[FileEntry]:
        """Finishes the last file; idempotent."""
        if self._pending:
            self._guard(self._write_batch)
        if self._writer:
            self._guard(self._finish_file)
        return self.files

    def abort(self) -> None:
        """Removes the unfinished file; finished ones stay."""
        self._pending = []
        if self._temporary:
            for stream in (self._writer, self._sink):
                # Closing writes a footer, which a full disk refuses again, as does a closed file.
                with suppress(OSError, ValueError):
                    stream.close()
            self._temporary.unlink(missing_ok=True)
            self._sink = self._writer = self._temporary = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.close() if kind is None else self.abort()

    def _guard(self, step) -> None:
        try:
            step()
        except OSError as error:
            where = self._temporary or self.directory
            self.abort()
            raise UserError(
                f"{where} cannot be written: {error.strerror or error}. Free space or choose another --out."
            ) from None

    def _write_batch(self) -> None:
        if self._writer is None:
            self._temporary = self.directory / f".{self.prefix}-{len(self.files):05d}.arrow.part"
            self._sink = open(self._temporary, "wb")  # noqa: SIM115, closed in _finish_file or abort
            self._writer = pa.ipc.new_file(self._sink, self.schema)
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self.schema))
        self._rows_in_file += len(self._pending)
        self._pending = []

    def _finish_file(self) -> None:
        self._writer.close()
        self._sink.close()
        sync(self._temporary)
        final = self.directory / f"{self.prefix}-{len(self.files):05d}.arrow"
        entry = FileEntry(
            name=final.name,
            rows=self._rows_in_file,
            bytes=self._temporary.stat().st_size,
            sha256=file_sha256(self._temporary),
        )
        os.replace(self._temporary, final)
        sync(self.directory)
        self.files.append(entry)
        self._rows_in_file = 0
        self._sink = self._writer = self._temporary = None


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Row:
    """One sample as stored (see ROW_SCHEMA); arrays are int32 views of the mapped file.

    label_spans is [S, 2]; prompt_ids is what evaluation generates from.
    """

    id: str
    token_ids: np.ndarray
    label_spans: np.ndarray
    prompt_ids: np.ndarray
    image: int
    has_image: bool
    has_hint: bool
    answer: int
    n_choices: int
    subject: str
    grade: str


class ShardReader:
    """Random access to one split of a shard directory, and to the images it refers to.

    Opening reads the manifest and the files' footers only. Pickles by path, for worker processes.

    Attributes: directory, split, manifest, frame.

    Raises:
        UserError: no manifest, wrong schema version, no such split, a file missing, of the wrong size or
        damaged.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory, self.split = Path(directory), split
        self.manifest: Manifest = load_manifest(directory)
        self.frame: Frame = self.manifest.frame
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise UserError(f"{directory} has no split '{split}': it has {known}; prepare it with --splits.")
        self._rows = _Table(self.directory, self.manifest.splits[split].files, ROW_SCHEMA)
        images = self.manifest.images
        self._images = _Table(self.directory, images.files, IMAGE_SCHEMA) if images else None
        features = self.manifest.features
        self._features = _Table(self.directory, features.files, FEATURE_SCHEMA) if features else None

    def __len__(self) -> int:
        return self._rows.length

    def __reduce__(self):
        return ShardReader, (self.directory, self.split)

    def row(self, index: int) -> Row:
        """Row `index`, in O(1)."""
        batch, i = self._rows.locate(index)
        token_ids = batch.items("token_ids", i)
        prompt_ids = batch.items("prompt_ids", i)
        return Row(
            id=batch.value("id", i),
            token_ids=token_ids,
            label_spans=batch.items("label_spans", i).reshape(-1, 2),
            prompt_ids=prompt_ids if len(prompt_ids) else token_ids[: batch.value("prompt_length", i)],
            image=batch.value("image", i),
            has_image=batch.value("has_image", i),
            has_hint=batch.value("has_hint", i),
            answer=batch.value("answer", i),
            n_choices=batch.value("n_choices", i),
            subject=batch.value("subject", i),
            grade=batch.value("grade", i),
        )

    def image(self, index: int) -> np.ndarray:
        """Pixels of image Row.image, uint8 [size, size, 3], a read-only view of the mapped file."""
        batch, i = self._images.locate(index)
        size = self.manifest.images.size
        return batch.bytes("pixels", i).reshape(size, size, 3)

    def features(self, index: int) -> np.ndarray:
        """Cached [cls] features of image Row.image, float32 [P, W], a read-only view of the mapped file."""
        batch, i = self._features.locate(index)
        entry = self.manifest.features
        return batch.items("features", i).reshape(entry.visual_tokens, entry.width)

    def visual_input(self, vision_source: str) -> Callable[[int], np.ndarray]:
        """What a recipe with this model.vision_source reads of an image, by Row.image: its pixels or its features."""
        return self.features if vision_source == "cached" else self.image

    def lengths(self, visual_tokens: int) -> np.ndarray:
        """Ids of every sample laid out for training, without the modality token; int64 [rows]."""
        return laid_out_lengths(self._rows.counts("token_ids"), self.has_pixels, self.frame, visual_tokens)

    def prompt_lengths(self, visual_tokens: int) -> np.ndarray:
        """Ids of every sample laid out for evaluation; int64 [rows]."""
        own = self._rows.counts("prompt_ids")
        counts = np.where(own, own, self._rows.column("prompt_length"))
        return laid_out_lengths(counts, self.has_pixels, self.frame, visual_tokens)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Labelled tokens (response and EOS) of every sample; int64 [rows]. 0: for evaluation only."""
        return self._rows.column("label_count").astype(np.int64)

    @cached_property
    def trainable(self) -> np.ndarray:
        """Indices of the rows that have labels, ascending; int64. What training samples from."""
        return np.flatnonzero(self.label_counts)

    @cached_property
    def has_pixels(self) -> np.ndarray:
        """Which rows have an image in the image table; bool [rows]."""
        return self._rows.column("image") >= 0

    def verify(self) -> None:
        """Checks every file of the directory, against its checksum; UserError at the first that fails."""
        for entry in self.manifest.all_files():
            path = self.directory / entry.name
            if file_sha256(path) != entry.sha256:
                raise UserError(f"{path} does not have the checksum of the manifest: copy or prepare it again.")


class _Table:
    """Rows that run over several memory-mapped files and, within them, Arrow batches."""

    def __init__(self, directory: Path, files: Iterable[FileEntry], schema: pa.Schema):
        self._batches: list[_Batch] = []
        for entry in files:
            self._batches += _open(directory / entry.name, entry, schema)
        self._ends = list(accumulate(batch.rows for batch in self._batches))
        self.length = self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[_Batch, int]:
        """The batch that holds row `index`, and the row within it."""
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        number = bisect_right(self._ends, index)
        return self._batches[number], index - self._ends[number] + self._batches[number].rows

    def column(self, name: str) -> np.ndarray:
        """A column of numbers or booleans; [rows]."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def counts(self, name: str) -> np.ndarray:
        """How many items each row's list has, from the offsets alone; [rows]."""
        parts = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class _Batch:
    """One Arrow record batch, its columns looked up once and then read as numpy views."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch, self.rows = batch, batch.num_rows
        self._columns: dict[str, pa.Array] = {}
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def column(self, name: str) -> pa.Array:
        if name not in self._columns:
            self._columns[name] = self._batch.column(name)
        return self._columns[name]

    def value(self, name: str, i: int):
        return self.column(name)[i].as_py()

    def items(self, name: str, i: int) -> np.ndarray:
        if name not in self._lists:
            column = self.column(name)
            self._lists[name] = column.offsets.to_numpy(), column.values.to_numpy()
        offsets, values = self._lists[name]
        return values[offsets[i] : offsets[i + 1]]

    def bytes(self, name: str, i: int) -> np.ndarray:
        return np.frombuffer(self.column(name)[i].as_buffer(), dtype=np.uint8)


def _open(path: Path, entry: FileEntry, schema: pa.Schema) -> list[_Batch]:
    """Maps one file and checks it against its manifest entry without reading its rows."""
    remedy = "copy the shard directory again or prepare it again with `lavin-ds prep`"
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"Shard {path} is missing: {remedy}.") from None
    if size != entry.bytes:
        raise UserError(f"Shard {path} has {size} bytes and the manifest says {entry.bytes}: {remedy}.")
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [_Batch(file.get_batch(i)) for i in range(file.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"Shard {path} is damaged ({error}): {remedy}.") from None
    if not file.schema.equals(schema):
        raise UserError(f"Shard {path} does not have the columns of this schema version: {remedy}.")
    if sum(batch.rows for batch in batches) != entry.rows:
        raise UserError(f"Shard {path} does not have the {entry.rows} rows of the manifest: {remedy}.")
    return batches
