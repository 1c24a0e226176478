"""Time: the linear extrapolation in layers, the roofline, and how lengths make ranks wait."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from lavin_ds.config import load_recipe
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.sample import generate
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.devices import DEVICES
from lavin_ds.errors import UserError
from lavin_ds.models.counting import count_parameters
from lavin_ds.profiling.calibration import device_named
from lavin_ds.profiling.layers import from_few_layers, peak_components
from lavin_ds.profiling.simulation import simulate
from lavin_ds.profiling.step_time import estimate, micro_step, pace
from lavin_ds.profiling.training_set import TrainingSet, from_shards, scienceqa
from lavin_ds.profiling.workload import Workload

DEVICE = DEVICES["a100-80g"]


def test_a_step_is_linear_in_the_layers_of_both_towers(tiny):
    workload = Workload(2, 64, 0.5, 0.5)
    llm = tiny.model.llm.model_copy(update={"n_layers": 5})
    vision = tiny.model.vision.model_copy(update={"layers": 4})
    config = tiny.model_copy(update={"model": tiny.model.model_copy(update={"llm": llm, "vision": vision})})

    def measure(simulation):
        return np.array([*micro_step(simulation, DEVICE), *peak_components(simulation)])

    for changes in ({}, {"activation_checkpointing": True}):
        changed = config.model_copy(update={"training": config.training.model_copy(update=changes)})
        for gpus in (1, 2):
            whole = measure(simulate(changed, workload, gpus))
            assert from_few_layers(changed, workload, measure, gpus) == pytest.approx(whole, rel=1e-6, abs=64)


def test_the_assumed_training_set_is_scienceqa():
    training_set = scienceqa(512)
    assert len(training_set.lengths) == 12_726
    assert training_set.lengths.max() <= 512
    assert training_set.lengths.mean() == pytest.approx(294.7, rel=0.01)


def test_shards_give_their_own_lengths(tmp_path):
    generate(tmp_path / "data", train=40, val=1, test=1)
    tokenizer = Path(str(files("lavin_ds").joinpath("assets/tiny/llama/tokenizer.model")))
    config = load_recipe("tiny")
    prepare(ScienceQA(tmp_path / "data", splits="train"), tokenizer, tmp_path / "shards", config)
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
    assert full.hours == pytest.approx(40 * (full.roofline_seconds + full.communication_seconds) / 3600)
    assert half.step_seconds == pytest.approx(full.step_seconds + full.roofline_seconds)
    # At stage 2, each of two ranks sends half of its gradients in every micro-batch, and in the end half of the values.
    halves = full.pace.micro_batches + 1
    assert full.exchanged_bytes == pytest.approx(halves * 4 * count_parameters(config).trainable / 2, rel=0.001)
    assert full.kilowatt_hours == pytest.approx(full.hours * 2 * 0.4)
    assert estimate(config, training_set, DEVICE, 2, 1.0, price=3.0).price == pytest.approx(full.hours * 6)
    with pytest.raises(UserError, match="efficiency is 0"):
        estimate(config, training_set, DEVICE, 2, 0)


def test_what_zero3_sends_is_that_of_the_whole_model(tiny, tmp_path):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    llm = tiny.model.llm.model_copy(update={"n_layers": 6})
    model = tiny.model.model_copy(update={"frozen_dtype": "bf16", "llm": llm, "vision": None})
    config = tiny.model_copy(update={"model": model, "deepspeed": str(tmp_path / "zero3.json")})
    time = estimate(config, TrainingSet(np.full(64, 64), 0.0, 0.7, "64 samples"), DEVICE, 2)
    step = micro_step(simulate(config, Workload(4, 64, 0.0, 0.7), 2), DEVICE)
    assert step.shared == 0 and step.exchanged_once == 0
    assert time.exchanged_bytes == pytest.approx(time.pace.micro_batches * step.exchanged)
    weights = sum(count_parameters(config).frozen_bytes.values())
    assert step.exchanged > 0.9 * weights / 2  # of two ranks, each sends its half of every parameter


def test_unknown_devices_are_refused_by_name():
    with pytest.raises(UserError, match="a100-80g"):
        device_named("abacus")
