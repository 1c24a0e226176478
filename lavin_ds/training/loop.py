"""The training loop: one global batch an optimizer step, the mean over all of its labelled tokens.

The objective of a step (paper 1, eq. 5) is the mean cross-entropy over the labelled tokens of the whole global
batch, however it is cut into micro-batches and dealt to ranks. DeepSpeed averages gradients over data-parallel
ranks and over micro-batches, so every micro-batch's summed loss is multiplied by their number.
"""

from __future__ import annotations

import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from lavin_ds.config import RunConfig
from lavin_ds.data.collate import collate
from lavin_ds.data.sampler import assign, global_batch_indices, total_steps
from lavin_ds.data.shards import ShardReader
from lavin_ds.parallel import data_parallel_rank, data_parallel_size, tensor_parallel_size
from lavin_ds.training.schedule import step_learning_rate


class TrainingStopped(Exception):
    """The run was asked to stop by a signal; it has saved its state."""


class LossNotFinite(Exception):
    """The loss became NaN or infinite; the message names the step and its samples."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Sums are over all ranks; loss is per labelled token, seconds wall time."""

    step: int  # optimizer steps done, this one included
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float | None
    labelled_tokens: int
    tokens: int  # that samples hold, without padding
    padded_tokens: int
    seconds: float


class StopSignal:
    """Turns SIGTERM, SIGINT and Slurm's SIGUSR1 into a wish to stop after the current step."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = number


class Loop:
    """Steps a DeepSpeed engine through a split of the shards; the state is the engine and the step number."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: RunConfig, reader: ShardReader, device: torch.device):
        self.engine, self.config, self.reader, self.device = engine, config, reader, device
        self.visual_tokens = config.model.visual_tokens
        self.visual_input = reader.visual_input(config.model.vision_source)
        self.lengths = reader.lengths(self.visual_tokens)
        self.has_image = reader.has_pixels & (self.visual_tokens > 0)
        self.samples = reader.trainable
        self.total_steps = total_steps(len(self.samples), config.training.epochs, config.training.global_batch)

    def run(self, first_step: int, stop: StopSignal, on_step: Callable[[StepResult], None]) -> None:
        """Runs the steps from `first_step` on; `on_step` is called on every rank after each.

        Raises:
            TrainingStopped: a signal came to any rank; raised on all of them after the same step.
            LossNotFinite: on all ranks after the same step, before the update.
        """
        self.engine.train()
        for step in range(first_step, self.total_steps):
            result, stopping = self._step(step, stop)
            on_step(result)
            if stopping:
                raise TrainingStopped

    def _step(self, step: int, stop: StopSignal) -> tuple[StepResult, bool]:
        began = time.perf_counter()
        training, count = self.config.training, len(self.samples)
        chosen = self.samples[global_batch_indices(count, training.global_batch, training.seed, step)]
        ranks, rank = data_parallel_size(), data_parallel_rank()
        lengths, has_image = self.lengths[chosen], self.has_image[chosen]
        parts = assign(chosen, lengths, has_image, ranks, training.micro_batch, training.packing)[rank]
        labelled = int(self.reader.label_counts[chosen].sum())
        rate = step_learning_rate(step, count, training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # Dropout draws from torch's own generator, so that is what (seed, rank, step) must decide. Ranks that
        # share a tensor share data_parallel_rank, and so draw the same numbers.
        torch.manual_seed(zlib.crc32(f"dropout {training.seed} {rank} {step}".encode()))

        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, tokens, tokens with padding
        for k, rows in enumerate(parts):
            loss_sum, padded = self._micro_step(rows, labelled / (ranks * len(parts)))
            sums += torch.stack([loss_sum.double(), *sums.new_tensor([self.lengths[rows].sum(), padded])])
            if k + 1 < len(parts):
                self.engine.step()  # counts the micro-batch; the update is the last one's
        loss_total, tokens, padded_tokens, stops = self._sum_over_ranks(sums, bool(stop.received))
        loss = loss_total / labelled
        if not np.isfinite(loss):
            ids = ", ".join(self.reader.row(int(i)).id for i in chosen)
            raise LossNotFinite(f"The loss of step {step + 1} is {loss}. Its samples: {ids}.")
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        result = StepResult(
            step=step + 1,
            epoch=(step + 1) * training.global_batch / count,
            loss=loss,
            learning_rate=rate,
            gradient_norm=None if norm is None else float(norm),
            labelled_tokens=labelled,
            tokens=int(tokens),
            padded_tokens=int(padded_tokens),
            seconds=time.perf_counter() - began,
        )
        return result, stops > 0

    def _sum_over_ranks(self, sums: torch.Tensor, stopping: bool) -> list[float]:
        """Sums over the samples of all ranks, and how many ranks want to stop."""
        shared = torch.cat([sums / tensor_parallel_size(), sums.new_tensor([float(stopping)])])
        dist.all_reduce(shared)
        return shared.tolist()

    def _micro_step(self, rows: np.ndarray, labelled_share: float) -> tuple[torch.Tensor, int]:
        """Forward and backward of one micro-batch; returns its summed loss and its tokens with padding.

        labelled_share: labelled tokens of the global batch over all micro-batches of all ranks.
        """
        batch = collate(
            [self.reader.row(int(i)) for i in rows],
            self.visual_input,
            self.reader.frame,
            self.visual_tokens,
            self.config.training.packing,
        ).to(self.device)
        loss_sum, labels = self.engine(batch)
        # compat: every micro-batch weighs the same, however many labels it has.
        share = max(labels, 1) if self.config.compat else labelled_share
        self.engine.backward(loss_sum / share)
        return loss_sum.detach(), batch.ids_BT.numel()
