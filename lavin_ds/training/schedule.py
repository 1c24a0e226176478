"""The learning-rate schedule: linear warm-up, then cosine decay to zero (reference.md, section 6)."""

from __future__ import annotations

import math

from lavin_ds.config import TrainingConfig


def learning_rate(epoch: float, training: TrainingConfig) -> float:
    """Learning rate after `epoch` passes over the data; `epoch` may be fractional."""
    if epoch < training.warmup_epochs:
        return training.peak_lr * epoch / training.warmup_epochs
    progress = (epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs)
    return training.peak_lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def step_learning_rate(step: int, samples: int, training: TrainingConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, on a data set of `samples` samples.

    It is the schedule's rate at the middle of the step. At the beginning of the first step the rate is 0, which would
    waste an update.
    """
    return learning_rate((step + 0.5) * training.global_batch / samples, training)
