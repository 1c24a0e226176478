"""The same batch and seed on other ranks, another ZeRO stage or a split model is the same training."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # relative, fp32, dropout off


@pytest.fixture(scope="module")
def one_rank(workplace):
    return workplace.train("one-rank", 1)


def assert_same_training(run, reference):
    assert len(run.losses) == len(reference.losses) == 20
    torch.testing.assert_close(run.losses, reference.losses, rtol=TOLERANCE, atol=0)
    # The curve must mean something: a training that changes nothing would agree with itself too.
    assert reference.losses[-5:].mean() < reference.losses[:5].mean() - 0.05
    for name, value in reference.adapters.items():
        difference = (run.adapters[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert difference < 1e-3, name  # AdamW magnifies rounding where a gradient is nearly zero


def test_two_data_parallel_ranks_with_single_sample_micro_batches_train_like_one_rank(workplace, one_rank):
    # Single-sample micro-batches also mean that ranks often have no image while others have one.
    assert_same_training(workplace.train("data-parallel", 2, "training.micro_batch=1"), one_rank)


def test_two_tensor_parallel_ranks_train_like_one_rank(workplace, one_rank):
    assert_same_training(workplace.train("tensor-parallel", 2, "tensor_parallel=2"), one_rank)


def test_zero_stage_3_with_ranks_without_images_trains_like_one_rank(workplace, one_rank, tmp_path):
    # Threshold 0: every parameter is split, also those that a tiny model's defaults would keep whole.
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    run = workplace.train("zero-3", 2, "training.micro_batch=1", f"deepspeed={config}")
    assert_same_training(run, one_rank)


def test_zero_stage_0_trains_like_stage_2(workplace, one_rank):
    assert_same_training(workplace.train("zero-0", 1, "deepspeed=zero0"), one_rank)


def test_packed_samples_under_zero_stage_1_train_like_one_rank(workplace, one_rank):
    assert_same_training(workplace.train("packed", 1, "deepspeed=zero1", "training.packing=true"), one_rank)
