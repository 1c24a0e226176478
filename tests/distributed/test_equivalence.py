"""The same batch and seed on other ranks, another ZeRO stage or a split model is the same training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import torch

TOLERANCE = 1e-5  # relative, fp32, dropout off
STAGES = (0, 1, 2, 3)
# Ranks, tensor parallel, samples a micro-batch. With single-sample micro-batches a rank often has no image while
# another has one, and the counts of their labels differ.
LAYOUTS = ((1, 1, 2), (2, 1, 1), (2, 2, 4), (4, 1, 2), (4, 2, 2))
# One for each stage and each way to split; the others are slow.
QUICK = (((1, 1, 2), 0), ((2, 2, 4), 1), ((4, 2, 2), 2), ((2, 1, 1), 3))
GRAD_CLIP = 0.01
CLIP = f"training.grad_clip={GRAD_CLIP}"  # below the norm of most steps: the update depends on it


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[int, str]:
    """DeepSpeed files by stage. At stage 3 the threshold 0 splits also what a tiny model's default would keep whole."""
    folder = tmp_path_factory.mktemp("configs")
    for stage in STAGES:
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return {stage: str(folder / f"{stage}.json") for stage in STAGES}


@pytest.fixture(scope="module")
def reference(workplace, configs):
    """One rank, stage 0, the whole batch at once."""
    run = workplace.train("reference", 1, CLIP, "training.micro_batch=8", f"deepspeed={configs[0]}")
    # The curve must mean something: a training that changes nothing would agree with itself too.
    assert len(run.losses) == 20
    assert run.losses[-5:].mean() < run.losses[:5].mean() - 0.05
    assert sum(m["gradient_norm"] > GRAD_CLIP for m in run.metrics) > 10
    return run


@pytest.mark.parametrize(
    ("layout", "stage"),
    [pytest.param(*both, marks=() if both in QUICK else pytest.mark.slow) for both in product(LAYOUTS, STAGES)],
)
def test_every_layout_and_zero_stage_trains_like_one_rank(workplace, configs, reference, layout, stage):
    ranks, split, micro_batch = layout
    run = workplace.train(
        f"zero-{stage}-ranks-{ranks}-tp-{split}",
        ranks,
        CLIP,
        f"tensor_parallel={split}",
        f"training.micro_batch={micro_batch}",
        f"deepspeed={configs[stage]}",
    )
    assert_same_training(run, reference)


def test_packed_samples_train_like_padded_ones(workplace, configs, reference):
    run = workplace.train("packed", 1, CLIP, "training.packing=true", f"deepspeed={configs[1]}")
    assert_same_training(run, reference)


@pytest.mark.slow
def test_ranks_whose_losses_take_different_numbers_of_chunks_do_not_wait_forever(configs):
    script = Path(__file__).with_name("unequal_chunks.py")
    with subprocess.Popen([sys.executable, script, configs[3]], start_new_session=True) as ranks:
        try:
            assert ranks.wait(timeout=90) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)


def assert_same_training(run, reference):
    torch.testing.assert_close(run.losses, reference.losses, rtol=TOLERANCE, atol=0)
    # The norm counts each parameter once, whoever holds it.
    norms, wanted = (torch.tensor([m["gradient_norm"] for m in r.metrics]) for r in (run, reference))
    torch.testing.assert_close(norms, wanted, rtol=1e-4, atol=0)
    for name, value in reference.adapters.items():
        difference = (run.adapters[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert difference < 1e-3, name  # AdamW magnifies rounding where a gradient is nearly zero
