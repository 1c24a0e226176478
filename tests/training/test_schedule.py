"""The learning rate follows the authors' curve."""

from __future__ import annotations

import json

import pytest

from lavin_ds.config import TrainingConfig
from lavin_ds.training.schedule import learning_rate, step_learning_rate


def test_curve_equals_the_authors_points(shared):
    for curve in json.loads((shared / "golden" / "text" / "lr.json").read_text()):
        training = TrainingConfig(epochs=curve["epochs"], warmup_epochs=curve["warmup"])
        for epoch, rate in curve["points"]:
            assert learning_rate(epoch, training) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_no_step_of_a_run_is_wasted_on_rate_zero():
    training = TrainingConfig(epochs=2, warmup_epochs=1, global_batch=10)
    rates = [step_learning_rate(step, 100, training) for step in range(20)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) < training.peak_lr


def test_no_warmup_starts_at_the_peak():
    training = TrainingConfig(epochs=1, warmup_epochs=0)
    assert learning_rate(0, training) == training.peak_lr
