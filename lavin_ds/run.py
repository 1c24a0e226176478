"""The run directory: everything that a training run writes, and enough to resume it.

RUN/run.json                  the resolved configuration, the inputs, every start (RunRecord below)
RUN/metrics.jsonl             one line per optimizer step
RUN/checkpoints/              trainable parameters, optimizer state and position, to resume from
RUN/adapter.safetensors       the trained adapters, written when the run is complete
RUN/adapter-best.safetensors  the adapters with the lowest validation loss
RUN/summary.json              results and cost: losses, steps, seconds, peak memory
RUN/loss.png                  the loss curve
RUN/suspects.json             samples that may have made the run diverge
RUN/monitors/                 files of the monitors that the DeepSpeed configuration enables
RUN/.lock                     locked while a process trains here
RUN/.stop                     asks a run on several nodes to save and end
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.files import write_json

LOCK, STOP, MONITORS, CHECKPOINTS = ".lock", ".stop", "monitors", "checkpoints"
SPLIT, VALIDATION_SPLIT = "train", "val"  # the shards' splits that a run trains on and validates on
PACKAGES = (
    "lavin_ds",
    "torch",
    "deepspeed",
    "fairscale",
    "safetensors",
    "pyarrow",
    "numpy",
)


class Inputs(BaseModel):
    """Absolute paths of a run's inputs. `clip` is None if no ViT runs (text-only, or cached features)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    llama: Path
    clip: Path | None = None
    init_adapter: Path | None = None  # adapters to start from; None to start from new ones


class Start(BaseModel):
    """One start of a run: the first start, or a later one that resumed the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    began: str  # UTC, ISO 8601
    step: int  # steps done before this start
    ranks: int
    versions: dict[str, str]
    git_revision: str | None = None

    @classmethod
    def here(cls, began: datetime, step: int, ranks: int) -> Start:
        """A start by this process, with its versions."""
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        return cls(
            began=began.isoformat(timespec="seconds"),
            step=step,
            ranks=ranks,
            versions=versions,
            git_revision=_git_revision(),
        )


def _git_revision() -> str | None:
    """The git revision of the checkout; None for an installed wheel."""
    try:
        done = subprocess.run(
            ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class RunRecord(BaseModel):
    """RUN/run.json. config: of the latest start; a resumed run may change only keys that launching/resume.py lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: RunConfig
    inputs: Inputs
    data_sha256: str  # of the shards' manifest
    starts: tuple[Start, ...]

    @property
    def ranks(self) -> int:
        """The number of ranks of the latest start."""
        return self.starts[-1].ranks

    def save(self, run: Path) -> None:
        write_json(run / "run.json", self.model_dump(mode="json"))


def load_run(run: Path) -> RunRecord:
    """Reads a run directory's record.

    Raises:
        UserError: there is no run.json, or this version cannot read it.
    """
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: it has no run.json. Give the --out of a training run.")
    try:
        return RunRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Was it made by another version?") from None


def read_metrics(path: Path) -> list[dict]:
    """The recorded steps, in order. If a crash cut the last line short, that line is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def check_free(run: Path) -> None:
    """Raises UserError if a process trains in this folder. Waits up to 3 seconds, as that process may be ending."""
    deadline = time.monotonic() + 3
    while (run / LOCK).is_file():
        with open(run / LOCK, encoding="utf-8") as file:
            try:
                if _lock(file):
                    return
            except OSError:  # the file system has no locks; hold() warns of it
                return
            if time.monotonic() > deadline:
                raise _in_use(run, file.read())
        time.sleep(0.2)


@contextmanager
def hold(run: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Makes the folder and locks it against other training processes. The system releases the lock if the process dies.

    At the end, a folder that was made here is removed if nothing was trained in it.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made.
    """
    existed = run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"--out {run} cannot be written: {error.strerror}.") from None
    with file:
        try:
            if not _lock(file):
                file.seek(0)
                raise _in_use(run, file.read())
        except OSError as error:  # the file system has no locks
            warn(f"{run} cannot be locked ({error.strerror}): make sure that no other run trains there.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            if not existed:
                remove_if_unused(run)


def remove_if_unused(run: Path) -> None:
    """Removes a run directory if nothing was trained in it, that is, if it has no run.json."""
    if (run / "run.json").exists():
        return
    shutil.rmtree(run / MONITORS, ignore_errors=True)
    for name in (LOCK, STOP):
        (run / name).unlink(missing_ok=True)
    with suppress(OSError):  # it does not exist, or holds other files
        run.rmdir()


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(run: Path, holder: str) -> UserError:
    return UserError(f"A run is going on in {run} ({holder}): wait for it, stop it, or give another --out.")


def adapter_file(run: Path) -> Path:
    """The adapter file of a complete run.

    Raises:
        UserError: the run is not complete.
    """
    path = run / "adapter.safetensors"
    if not path.is_file():
        raise UserError(
            f"{run} has no adapter.safetensors: the run is not complete. Finish it with --resume auto first."
        )
    return path
