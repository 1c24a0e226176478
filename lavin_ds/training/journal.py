"""What happens after each step of a run: validation, records, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch.distributed as dist
from torch import nn

from lavin_ds.config import RunConfig
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.errors import UserError
from lavin_ds.run import CHECKPOINTS, Inputs, RunRecord, Start, load_run
from lavin_ds.training import checkpoint
from lavin_ds.training.console import TrainingConsole
from lavin_ds.training.loop import Loop, StepResult, TrainingStopped
from lavin_ds.training.metrics import MetricsFile, write_to_monitors
from lavin_ds.training.stop import StopSignal
from lavin_ds.training.validation import Scores, Validation


class Journal:
    """Validates, records and saves a run. Every rank has a journal and makes the same calls; only rank 0 writes.

    at: the position after the last step, with its validation loss. run.json and metrics.jsonl are opened only when
    there is something to record, so a start that fails earlier leaves nothing behind.
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        inputs: Inputs,
        loop: Loop,
        trainable: dict[str, nn.Parameter],
        validation: Validation | None,
        console: TrainingConsole,
        began: datetime,
    ):
        self.out, self.config, self.inputs, self.began = out, config, inputs, began
        self.loop, self.trainable, self.validation, self.console = loop, trainable, validation, console
        self.checkpoints = out / CHECKPOINTS
        self.at = loop.at
        self.resumed_at = self.saved_at = loop.at.step
        self.best = _best_loss_on_all_ranks(self.checkpoints)
        self.metrics: MetricsFile | None = None

    def on_step(self, result: StepResult, stop: StopSignal) -> None:
        """Validates and saves if that is due after this step, and records the step.

        Raises:
            TrainingStopped: on all ranks, if a stop request ends the validation.
        """
        is_due = self._is_validation_due(result.step)
        scores = self._validate(stop) if is_due else None
        self.at = replace(self.loop.at, val_loss=scores.val_loss if scores else None)
        self._open()
        if self.metrics:
            self.metrics.add(result, scores)
            write_to_monitors(self.loop.engine, result.step, result, scores)
        self.console.step(result, scores)
        if is_due and scores is None:
            raise TrainingStopped
        is_best = scores is not None and self._is_best(scores)
        is_last = result.step == self.loop.total_steps
        if is_best or is_last or result.step % self.config.training.checkpoint_every == 0:
            self.save()

    def make_up_for_validation(self, stop: StopSignal) -> None:
        """Validates the step that the run resumes from, if a stop request ended its validation before.

        Raises:
            TrainingStopped: on all ranks, if a stop request ends this validation, too.
        """
        if not self.at.step or self.at.val_loss is not None or not self._is_validation_due(self.at.step):
            return
        scores = self._validate(stop)
        if scores is None:
            raise TrainingStopped
        self.at = replace(self.at, val_loss=scores.val_loss)
        self._is_best(scores)
        self._open()
        if self.metrics:
            self.metrics.add_scores(self.at.step, scores)
            write_to_monitors(self.loop.engine, self.at.step, None, scores)
            checkpoint.set_validation_loss(self.checkpoints, self.at.step, scores.val_loss)
        self.console.say(f"Validated step {self.at.step}: loss {scores.val_loss:.4f}")

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one already, as when a stop request comes after a regular save."""
        if self.at.step != self.saved_at:
            keep = self.config.training.keep_checkpoints
            checkpoint.save(self.checkpoints, self.loop.engine, self.trainable, self.at, keep, self.console.warn)
            self.saved_at = self.at.step

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()

    def _is_validation_due(self, step: int) -> bool:
        every = self.config.training.validate_every
        return self.validation is not None and (step == self.loop.total_steps or step % every == 0)

    def _validate(self, stop: StopSignal) -> Scores | None:
        with self.console.doing("validating"):
            return self.validation.run(stop)

    def _is_best(self, scores: Scores) -> bool:
        """Whether the validation loss is the lowest so far; if so, remembers it."""
        if not math.isfinite(scores.val_loss) or (self.best is not None and scores.val_loss >= self.best):
            return False
        self.best = scores.val_loss
        return True

    def _open(self) -> None:
        if self.metrics or dist.get_rank() != 0:
            return
        earlier = load_run(self.out).starts if (self.out / "run.json").exists() else ()
        record = RunRecord(
            config=self.config,
            inputs=self.inputs,
            data_sha256=manifest_sha256(self.inputs.data, self.config.model.vision_source),
            starts=(*earlier, Start.here(self.began, self.resumed_at, dist.get_world_size())),
        )
        record.save(self.out)
        self.metrics = MetricsFile(self.out / "metrics.jsonl", self.resumed_at)


def _best_loss_on_all_ranks(checkpoints: Path) -> float | None:
    """checkpoint.best_loss of rank 0, on all ranks: other nodes may see a new file later than rank 0."""
    best, trouble = None, None
    if dist.get_rank() == 0:
        try:
            best = checkpoint.best_loss(checkpoints)
        except UserError as error:
            trouble = str(error)
    told = [(best, trouble)]
    dist.broadcast_object_list(told, src=0)
    best, trouble = told[0]
    if trouble:
        raise UserError(trouble)
    return best
