"""Training over an fp16 base: gradients do not vanish in it, whatever holds them."""

from __future__ import annotations

import shutil

import pytest
import torch

FP16 = "model.frozen_dtype=fp16"


@pytest.fixture(scope="module")
def fp32(workplace):
    return workplace.train("fp32", 1, "deepspeed=zero0")


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 2), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_losses_and_gradients_are_those_of_an_fp32_base_to_fp16s_precision(workplace, fp32, ranks, stage):
    run = workplace.train(f"fp16-{stage}", ranks, FP16, f"deepspeed=zero{stage}")
    made = torch.tensor([not m["skipped"] for m in run.metrics])
    assert made.sum() >= 15  # some steps may overflow until the scale is found
    torch.testing.assert_close(run.losses, fp32.losses, rtol=3e-3, atol=0)
    if made.all():  # one update less leaves other parameters
        norms, wanted = (torch.tensor([m["gradient_norm"] for m in r.metrics]) for r in (run, fp32))
        torch.testing.assert_close(norms, wanted, rtol=0.02, atol=0)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_scale_and_ends_bit_identical(workplace):
    whole = workplace.train("fp16-whole", 1, FP16, "training.checkpoint_every=15")
    folder = whole.folder.with_name("fp16-resumed")
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    resumed = workplace.train(folder.name, 1, FP16, "training.checkpoint_every=15", resume="auto")
    assert all(torch.equal(resumed.adapters[name], value) for name, value in whole.adapters.items())
