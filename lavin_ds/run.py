"""A run directory: everything a training run leaves behind, and enough to start it again.

RUN/run.json             the resolved configuration, the inputs, the versions (this file's RunRecord)
RUN/metrics.jsonl        one line an optimizer step
RUN/checkpoints/         trainables, optimizer and position, to resume from
RUN/adapter.safetensors  the trained adapters, once the run is complete
RUN/summary.json         what it cost: steps, seconds, peak memory
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.files import write_json


class Inputs(BaseModel):
    """Where a run's inputs lie, absolute paths; `clip` is None for a text-only run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    llama: Path
    clip: Path | None = None


class RunRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    config: RunConfig
    inputs: Inputs
    data_sha256: str  # of the shards' manifest
    ranks: int
    versions: dict[str, str]
    git_revision: str | None = None

    def save(self, run: Path) -> None:
        write_json(run / "run.json", self.model_dump(mode="json"))


def load_run(run: Path) -> RunRecord:
    """Reads a run directory's record.

    Raises:
        UserError: there is no run.json, or it is not one this version can read.
    """
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: it has no run.json. Give the --out of a training run.")
    try:
        return RunRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Was it made by another version?") from None


def adapter_file(run: Path) -> Path:
    """The trained adapters of a complete run.

    Raises:
        UserError: the run did not complete.
    """
    path = run / "adapter.safetensors"
    if not path.is_file():
        raise UserError(
            f"{run} has no adapter.safetensors: the run is not complete. Finish it with --resume auto first."
        )
    return path
