"""The loss scale leaves gradients as they are, falls on overflow and rises again."""

from __future__ import annotations

import torch
from torch import nn

from lavin_ds.training.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale


def test_gradients_arrive_unscaled_where_they_would_have_vanished():
    weight = nn.Parameter(torch.ones(4))
    scale = LossScale([weight])
    tiny = torch.full((4,), 1e-9)

    def gradient(factor: float) -> torch.Tensor:
        weight.grad = None
        through_fp16 = (weight.half() * 1).float()  # backward rounds the gradient to fp16
        ((through_fp16 * tiny).sum() * factor).backward()
        return weight.grad

    torch.testing.assert_close(gradient(scale.factor), tiny, rtol=1e-2, atol=0)
    assert not gradient(1.0).any()


def test_the_scale_halves_on_overflow_and_doubles_after_the_growth_interval():
    scale = LossScale([])
    scale.update(overflowed=True)
    assert (scale.factor, scale.age) == (INITIAL_SCALE / 2, 0)
    for _ in range(GROWTH_INTERVAL):
        scale.update(overflowed=False)
    assert (scale.factor, scale.age) == (INITIAL_SCALE, 0)
    for _ in range(40):
        scale.update(overflowed=True)
    assert scale.factor == 1
