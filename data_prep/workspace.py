"""The unfinished output of a job. If the job is killed, the same command continues from here.

.OUT.part/lock             locked while a job runs
.OUT.part/progress.jsonl   line 1: the job's inputs and settings; then one line per finished task, with its result
.OUT.part/shards/          renamed to OUT when the job is complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from lavin_ds.data.schema import MANIFEST_NAME
from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_atomically


class Workspace:
    """Made by `open_workspace`. `shards` is the folder to fill, `done` holds the results of finished tasks by name."""

    def __init__(self, out: Path, part: Path):
        self.out, self.part, self.shards = out, part, part / "shards"
        self.done: dict[str, dict] = {}
        self._progress: BinaryIO | None = None

    def record(self, task: str, result: dict) -> None:
        """Notes that a task is finished; its file, if it wrote one, must be whole and on disk."""
        self.done[task] = result
        self._append({"task": task, "result": result})

    def publish(self) -> None:
        """Renames the shards to OUT. An older OUT is removed only now."""
        sync(self.shards)
        old = self.part / "old"
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(self.shards, self.out)
        sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the unfinished output."""
        self.close()
        shutil.rmtree(self.part, ignore_errors=True)

    def close(self) -> None:
        if self._progress:
            with suppress(OSError):  # closing writes again what did not fit on a full disk
                self._progress.close()

    def _start(self, inputs: dict[str, str], restart: bool) -> None:
        path = self.part / "progress.jsonl"
        lines = [] if restart else _read_lines(path)
        if lines and lines[0] != inputs:
            raise UserError(
                f"{self.part} holds an unfinished job with other inputs or settings ({_changes(lines[0], inputs)}): "
                "finish it with the command that started it, or throw it away with --restart."
            )
        kept = [line for line in lines[1:] if self._is_there(line["result"].get("file"))]
        self.done = {line["task"]: line["result"] for line in kept}
        self._tidy_up({line["result"]["file"]["name"] for line in kept if line["result"].get("file")})
        # Rewritten, without the half line that a kill may have left.
        text = "".join(json.dumps(line) + "\n" for line in (inputs, *kept))
        write_atomically(path, lambda temporary: temporary.write_text(text))
        self._progress = open(path, "ab")  # noqa: SIM115, closed in close()

    def _is_there(self, file: dict | None) -> bool:
        path = self.shards / file["name"] if file else None
        return path is None or (path.is_file() and path.stat().st_size == file["bytes"])

    def _tidy_up(self, wanted: set[str]) -> None:
        self.shards.mkdir(exist_ok=True)
        for path in self.shards.iterdir():
            if path.name not in wanted:
                path.unlink()

    def _drop_half_files(self) -> None:
        """Removes the half files of workers that were ended while they wrote. A full disk needs the space."""
        for path in self.shards.glob(".*"):
            path.unlink(missing_ok=True)

    def _append(self, line: dict) -> None:
        self._progress.write(json.dumps(line).encode() + b"\n")
        self._progress.flush()
        os.fsync(self._progress.fileno())


@contextmanager
def open_workspace(out: Path, inputs: dict[str, str], overwrite: bool, restart: bool) -> Iterator[Workspace]:
    """The unfinished output for `out`, with the tasks that an earlier run with the same `inputs` finished.

    Raises:
        UserError: `out` exists (with `overwrite`: and is not a shard directory), another job is preparing it, an
            unfinished job has other inputs and `restart` is False, or the disk refuses to be written.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(f"{out} exists and is not empty: choose another --out, or replace it with --overwrite.")
        if not (out / MANIFEST_NAME).is_file():
            raise UserError(f"{out} is not a shard directory, so --overwrite leaves it alone: choose another --out.")
    part = out.parent / f".{out.name}.part"
    workspace = Workspace(out, part)
    try:
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "lock", "w") as lock, _locked(lock, out):
            workspace._start(inputs, restart)
            try:
                yield workspace
            finally:
                workspace._drop_half_files()
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"{where} cannot be written: {error.strerror or error}. Free space and run the same command again, or "
            "choose another --out."
        ) from None
    finally:
        workspace.close()


@contextmanager
def _locked(lock: TextIO, out: Path) -> Iterator[None]:
    """Holds the lock. The system releases it when the process ends, also if it is killed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another job is preparing {out} now: wait for it, or choose another --out.") from None
    yield


def _read_lines(path: Path) -> list[dict]:
    """The whole lines of a progress file; none if there is no file."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def _changes(old: dict[str, str], new: dict[str, str]) -> str:
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys)
