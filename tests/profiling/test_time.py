"""Time: the linear extrapolation in layers, the roofline, and how lengths make ranks wait."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from lavin_ds.config import load_recipe
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import prepare_scienceqa
from lavin_ds.errors import UserError
from lavin_ds.profiling.memory import Workload, simulate
from lavin_ds.profiling.time import (
    DEVICES,
    TrainingSet,
    device_named,
    estimate,
    from_shards,
    linear_in_layers,
    pace,
    roofline_seconds,
    scienceqa,
)

DEVICE = DEVICES["a100-80g"]


def measure(simulation):
    return np.array([simulation.flops(), roofline_seconds(simulation, DEVICE)])


def test_a_step_is_linear_in_the_layers_of_both_towers(tiny):
    workload = Workload(2, 64, 0.5, 0.5)
    assert linear_in_layers(tiny, workload, measure) == pytest.approx(measure(simulate(tiny, workload)), rel=1e-9)


def test_the_assumed_training_set_is_scienceqa():
    training_set = scienceqa(512)
    assert len(training_set.lengths) == 12_726
    assert training_set.lengths.max() <= 512
    assert training_set.lengths.mean() == pytest.approx(294.7, rel=0.01)


def test_shards_give_their_own_lengths(tmp_path):
    generate(tmp_path / "data", train=40, val=1, test=1)
    tokenizer = Path(str(files("lavin_ds").joinpath("assets/tiny/llama/tokenizer.model")))
    config = load_recipe("tiny")
    prepare_scienceqa(tmp_path / "data", tokenizer, tmp_path / "shards", config, ["train"])
    training_set = from_shards(tmp_path / "shards", config.model.visual_tokens)
    assert len(training_set.lengths) == 40
    assert 0 < training_set.image_fraction < 1
    assert 0 < training_set.labelled_fraction < 1
    assert training_set.lengths.max() <= config.data.max_length
    assert from_shards(tmp_path / "shards", visual_tokens=0).image_fraction == 0


def test_more_ranks_wait_for_longer_samples():
    config, training_set = load_recipe("lavin-7b"), scienceqa(512)
    one, eight = pace(training_set, config, 1), pace(training_set, config, 8)
    assert (one.steps, one.micro_batches, eight.micro_batches) == (7953, 8, 1)
    assert one.mean_length < one.critical_length < eight.critical_length <= 512


def test_hours_follow_from_steps_and_roofline(tiny):
    config = tiny.model_copy(update={"model": tiny.model.model_copy(update={"frozen_dtype": "bf16"})})
    training_set = TrainingSet(np.full(64, 100), 0.5, 0.7, "64 samples")
    full, half = (estimate(config, training_set, DEVICE, 2, efficiency) for efficiency in (1.0, 0.5))
    assert full.pace.steps == 40  # 64 samples x 20 epochs / 32
    assert full.hours == pytest.approx(40 * full.roofline_seconds / 3600)
    assert half.hours == pytest.approx(2 * full.hours)
    with pytest.raises(UserError, match="efficiency is 0"):
        estimate(config, training_set, DEVICE, 2, 0)


def test_unknown_devices_are_refused_by_name():
    with pytest.raises(UserError, match="a100-80g"):
        device_named("abacus")
