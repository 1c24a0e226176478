"""The training loop: one global batch per optimizer step.

The objective of a step (paper 1, eq. 5) is the mean cross-entropy over the labelled tokens of the whole global batch.
It does not depend on how the batch is split into micro-batches and over ranks. DeepSpeed averages gradients over
data-parallel ranks and micro-batches, so the summed loss of a micro-batch is multiplied by both numbers.

If the loss or the gradient of a step is not finite, the step is skipped on all ranks: nothing is updated, and the run
goes on with the next global batch.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from lavin_ds.config import RunConfig
from lavin_ds.data.shards import ShardReader
from lavin_ds.parallel import data_parallel_rank, data_parallel_size, tensor_parallel_size
from lavin_ds.training.checkpoint import START, Position
from lavin_ds.training.feed import Feed, StepData, in_background
from lavin_ds.training.loss_scale import LossScale
from lavin_ds.training.schedule import step_learning_rate
from lavin_ds.training.stop import StopSignal


class TrainingStopped(Exception):
    """The run was asked to stop, by a signal or a file."""


class TrainingDiverged(Exception):
    """Too many steps in a row had no finite loss or gradient. The message names the last of them."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step. Sums are over all ranks; loss is per labelled token; seconds are wall time.

    In a skipped step, loss or gradient_norm is NaN or infinite. `suspects` then has the ids of the samples in
    micro-batches whose loss is not finite, or of all samples of the step if only the gradient is not finite. It is
    empty if the cause may be the loss scale of an fp16 base.
    """

    step: int  # optimizer steps done, including this one and skipped ones
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    labelled_tokens: int
    tokens: int  # without padding
    padded_tokens: int
    images: int
    seconds: float
    skipped: bool = False
    suspects: tuple[str, ...] = ()


class Loop:
    """Trains a DeepSpeed engine on a split of the shards. Its state is the engine and `at`."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: RunConfig,
        reader: ShardReader,
        device: torch.device,
        at: Position = START,
    ):
        self.engine, self.config, self.reader, self.device = engine, config, reader, device
        self.feed = Feed(config, reader, device)
        self.total_steps = self.feed.total_steps
        self.at, self.skipped_in_a_row = at, 0
        self.scale = None
        if config.model.frozen_dtype == "fp16":
            self.scale = LossScale(engine.module.trainable().values(), at.loss_scale, at.loss_scale_age)

    def run(self, stop: StopSignal, on_step: Callable[[StepResult], None]) -> None:
        """Runs the remaining steps, and calls `on_step` on every rank after each step.

        Raises:
            TrainingStopped: any rank was asked to stop; raised on all ranks after the same step.
            TrainingDiverged: `training.max_skipped_in_a_row` steps in a row were skipped; raised on all ranks.
        """
        self.engine.train()
        with in_background(self.feed.steps(self.at.step)) as steps:
            for data in steps:
                result, stopping = self._step(data, stop)
                self._count(result)
                on_step(result)
                if self.skipped_in_a_row == self.config.training.max_skipped_in_a_row:
                    raise TrainingDiverged(
                        f"Loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, the last of them "
                        f"step {result.step}: loss {result.loss}, gradient norm {result.gradient_norm}."
                    )
                if stopping:
                    raise TrainingStopped

    def _count(self, result: StepResult) -> None:
        lowers_scale = result.skipped and self._may_lower_scale()
        if self.scale:
            self.scale.update(overflowed=result.skipped)
        if not lowers_scale:  # a step that only lowers the loss scale is normal
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        self.at = Position(
            step=result.step,
            updates=self.at.updates + (not result.skipped),
            loss_scale=self.scale.factor if self.scale else 1.0,
            loss_scale_age=self.scale.age if self.scale else 0,
        )

    def _may_lower_scale(self) -> bool:
        return self.scale is not None and self.scale.factor > 1

    def _step(self, data: StepData, stop: StopSignal) -> tuple[StepResult, bool]:
        began = time.perf_counter()
        training, count = self.config.training, len(self.feed.samples)
        rate = step_learning_rate(data.step, count, training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # Dropout uses torch's global generator, so it is seeded with (seed, rank, step). The ranks of a tensor-parallel
        # group have the same data_parallel_rank, so they draw the same numbers.
        torch.manual_seed(zlib.crc32(f"dropout {training.seed} {data_parallel_rank()} {data.step}".encode()))

        losses, totals = self._gradients(data, stop)
        norm, updated = self._update()
        loss_sum, tokens, padded_tokens, stops = totals.tolist()
        result = StepResult(
            step=data.step + 1,
            epoch=(data.step + 1) * training.global_batch / count,
            loss=loss_sum / data.labelled,
            learning_rate=rate,
            gradient_norm=norm,
            labelled_tokens=data.labelled,
            tokens=int(tokens),
            padded_tokens=int(padded_tokens),
            images=data.images,
            seconds=time.perf_counter() - began,
            skipped=not updated,
            suspects=() if updated or self._may_lower_scale() else self._suspects(data, losses),
        )
        return result, stops > 0

    def _gradients(self, data: StepData, stop: StopSignal) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of all micro-batches. Returns the summed loss of each micro-batch, and four totals over
        all ranks: loss, tokens, tokens with padding, and ranks that were asked to stop."""
        share = data.labelled / (data_parallel_size() * len(data.batches))  # mean labelled tokens per micro-batch
        losses, padded = [], 0
        for k, batch in enumerate(data.batches):
            is_last = k + 1 == len(data.batches)
            loss_sum, labels = self.engine(batch.to(self.device))
            losses.append(loss_sum.detach().double())
            padded += batch.ids_BT.numel()
            if is_last:
                sums = losses[0].new_tensor([0.0, sum(data.tokens), padded, 0.0])
                sums[0] = torch.stack(losses).sum()
                totals = sums / tensor_parallel_size()
                totals[3] = float(stop.is_wanted())
                dist.all_reduce(totals)
                # The factor is 1, or NaN on all ranks if the loss of any rank is not finite. NaN makes the gradients of
                # all ranks NaN, so all ranks skip the step.
                loss_sum = loss_sum * (1 + 0 * totals[0]).to(loss_sum.dtype)
            # compat: every micro-batch has the same weight, however many labels it has.
            loss = loss_sum / (max(labels, 1) if self.config.compat else share)
            self.engine.backward(loss * self.scale.factor if self.scale else loss)
            if not is_last:
                self.engine.step()  # only counts the micro-batch; the last one updates
        return torch.stack(losses), totals

    def _update(self) -> tuple[float, bool]:
        """Updates the parameters if the gradient is finite. Returns the gradient norm, and whether it updated.

        Every rank has the norm of the whole gradient, so all ranks decide the same. DeepSpeed's ZeRO optimizers skip
        a gradient that is not finite; at stage 0 this is done here.
        """
        engine = self.engine
        if engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                engine.zero_grad()
            engine.step()
            return norm, math.isfinite(norm)
        engine.step()
        return float(engine.get_global_grad_norm()), not engine.optimizer.overflow

    def _suspects(self, data: StepData, losses: torch.Tensor) -> tuple[str, ...]:
        """Ids of the samples in micro-batches of any rank whose loss is not finite; else of all samples of the step."""
        bad = [k for k, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        here = [id for k in bad for id in data.batches[k].row_ids]
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        found = dict.fromkeys(id for ids in everywhere for id in ids)
        return tuple(found) or tuple(self.reader.row(int(i)).id for i in data.rows)
