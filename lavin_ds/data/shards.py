"""Arrow shards on disk: written whole or not at all, read row by row in any order through a memory map.

Files are uncompressed Arrow IPC. So a row is a slice of the mapped file: nothing is parsed or copied, and the ranks of
a machine share its pages.
"""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from lavin_ds.data.layout import Frame, laid_out_lengths
from lavin_ds.data.schema import FEATURE_SCHEMA, IMAGE_SCHEMA, ROW_SCHEMA, FileEntry, Manifest, load_manifest
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.files import sync

# Rows per Arrow batch. A writer holds one batch in memory: about 1 MB of tokens, or 5 MB of 224-pixel images.
ROW_BATCH = 1024
IMAGE_BATCH = 32


def write_shard(path: Path, schema: pa.Schema, rows: Iterable[dict], batch_rows: int) -> FileEntry | None:
    """Streams rows, one value per column, into a file; returns its entry. Memory holds one Arrow batch of `batch_rows`.

    The file gets its name only when it is complete and on disk, so a failure leaves no file. If there are no rows, no
    file is written and None is returned.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    rows = iter(rows)
    batch = list(islice(rows, batch_rows))
    if not batch:
        return None
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with _HashedFile(temporary) as file:
            with pa.ipc.new_file(file, schema) as writer:
                while batch:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    count += len(batch)
                    batch = list(islice(rows, batch_rows))
            file.flush()
            os.fsync(file.fileno())
            entry = FileEntry(name=path.name, rows=count, bytes=file.tell(), sha256=file.sha256.hexdigest())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free space and run the same command "
            "again, or choose another --out."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return entry


class _HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it. Arrow writes from front to back, so the hash is the file's."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return super().write(data)


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
    references: tuple[str, ...] = ()


class ShardReader:
    """Random access to one split of a shard directory, and to the images it refers to.

    Opening reads only the manifest and the files' footers. A reader is pickled as its path, for worker processes.

    Attributes: directory, split, manifest, frame, tokenizer.

    Raises:
        UserError: the manifest is missing or has another schema version; there is no such split; a file is missing,
            damaged or of the wrong size.
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

    def __len__(self) -> int:
        return self._rows.length

    def __reduce__(self):
        return ShardReader, (self.directory, self.split)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the texts were prepared with.

        Raises:
            UserError: the copy beside the shards is missing or was changed.
        """
        entry = self.manifest.tokenizer
        tokenizer = Tokenizer(self.directory / entry.file, entry.bos, entry.eos)
        if tokenizer.sha256 != entry.sha256:
            raise UserError(f"{tokenizer.path} is not the file {self.directory} was prepared with: copy it again.")
        return tokenizer

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
            references=tuple(batch.value("references", i)),
        )

    def id(self, index: int) -> str:
        """The id of row `index` alone."""
        batch, i = self._rows.locate(index)
        return batch.value("id", i)

    def image(self, index: int) -> np.ndarray:
        """Pixels of image Row.image, uint8 [size, size, 3], a read-only view of the mapped file."""
        batch, i = self._images.locate(index)
        size = self.manifest.images.size
        return batch.bytes("pixels", i).reshape(size, size, 3)

    def image_origin(self, index: int) -> tuple[str, str]:
        """SHA-256 and path of the source file of image Row.image."""
        batch, i = self._images.locate(index)
        return batch.value("id", i), batch.value("source", i)

    def features(self, index: int) -> np.ndarray:
        """Cached features of image Row.image, float32 [F, W], a read-only view of the mapped file."""
        batch, i = self._features.locate(index)
        entry = self.manifest.features
        return batch.items("features", i).reshape(entry.rows_per_image, entry.width)

    @cached_property
    def _features(self) -> _Table:
        # Opened on demand: training from pixels does not need them.
        return _Table(self.directory, self.manifest.features.files, FEATURE_SCHEMA)

    def visual_input(self, vision_source: str) -> Callable[[int], np.ndarray]:
        """The function that returns the pixels or the cached features of a Row.image, as model.vision_source says.

        Raises:
            UserError: a file of features is missing, damaged or of the wrong size.
        """
        if vision_source == "pixels":
            return self.image
        _ = self._features  # opens the files now, so that a damaged one is reported before training
        return self.features

    def lengths(self, visual_tokens: int) -> np.ndarray:
        """The number of ids of each sample laid out for training, without the modality token; int64 [rows]."""
        return laid_out_lengths(self._rows.counts("token_ids"), self.has_pixels, self.frame, visual_tokens)

    def prompt_lengths(self, visual_tokens: int) -> np.ndarray:
        """The number of ids of each sample laid out for evaluation, without the modality token; int64 [rows]."""
        own = self._rows.counts("prompt_ids")
        counts = np.where(own, own, self._rows.column("prompt_length"))
        return laid_out_lengths(counts, self.has_pixels, self.frame, visual_tokens)

    @cached_property
    def label_counts(self) -> np.ndarray:
        """The number of labelled tokens (response and EOS) of each sample; int64 [rows]. 0: for evaluation only."""
        return self._rows.column("label_count").astype(np.int64)

    @cached_property
    def trainable(self) -> np.ndarray:
        """Indices of the rows that have labels, ascending; int64. Training uses these rows."""
        return np.flatnonzero(self.label_counts)

    @cached_property
    def has_pixels(self) -> np.ndarray:
        """Which rows have an image in the image table; bool [rows]."""
        return self._rows.column("image") >= 0

    def verify(self) -> None:
        """Checks every file of the directory against its checksum; raises UserError at the first that differs."""
        for entry in self.manifest.all_files():
            path = self.directory / entry.name
            if file_sha256(path) != entry.sha256:
                raise UserError(f"{path} does not have the checksum of the manifest: copy or prepare it again.")


class _Table:
    """The rows of several memory-mapped files, each of several Arrow batches."""

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
        """The number of items in each row's list, read from the offsets alone; [rows]."""
        parts = [np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class _Batch:
    """One Arrow record batch. A column is looked up once and then read as a numpy view."""

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
