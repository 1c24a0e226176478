"""`--fit`: the setting fits, is the fastest tried, and its command is one that the recipe takes."""

import shlex

import numpy as np
import pytest

from lavin_ds.config import load_recipe
from lavin_ds.devices import DEVICES, OVERHEAD
from lavin_ds.profiling.fit import Setting, _Search, find_fit
from lavin_ds.profiling.simulation import simulate
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import worst_case

DEVICE = DEVICES["rtx-4090"]
TRAINING_SET = TrainingSet(np.full(64, 40), 0.5, 0.7, "64 samples")
SMALL = [
    "model.llm={dim: 64, n_layers: 4, n_heads: 2, ffn_dim: 128, vocab_size: 256}",
    "model.vision=null",
    "data.max_length=64",
    "training.global_batch=4",
]


def fit(room: int, gpus: int = 1, overrides=()):
    """`room` is for tensors."""
    config = load_recipe("lavin-7b", [*SMALL, *overrides])
    return config, find_fit(config, int(room + OVERHEAD), DEVICE, gpus, TRAINING_SET, 0.4)


def peak(*overrides: str, gpus: int = 1) -> int:
    config = load_recipe("lavin-7b", [*SMALL, *overrides])
    return simulate(config, worst_case(config), gpus).peak_bytes


def test_with_room_nothing_is_recomputed_and_the_command_trains_what_was_found():
    _, found = fit(10**9)
    words = shlex.split(found.command("lavin-7b", 1, SMALL))
    assert words[:4] == ["lavin-ds", "train", "--recipe", "lavin-7b"]
    overrides = words[words.index("--ranks") + 2 :]
    config = load_recipe("lavin-7b", overrides)
    assert config == found.best.config
    assert not config.training.activation_checkpointing and config.tensor_parallel == 1
    assert config.training.micro_batch == 4  # all lengths are alike: nothing is lost by more at once
    assert found.best.peak_bytes == simulate(config, worst_case(config), 1).peak_bytes


def test_a_tight_card_recomputes_and_the_whole_model_was_simulated():
    kept = peak("training.micro_batch=1", "training.activation_checkpointing=false")
    recomputed = peak("training.micro_batch=1", "training.activation_checkpointing=true")
    assert recomputed < kept
    _, found = fit((kept + recomputed) // 2)
    assert found.best.config.training.activation_checkpointing
    assert found.best.config.training.micro_batch == 1
    assert found.best.peak_bytes <= (kept + recomputed) // 2


@pytest.mark.parametrize("value", [False, 3])
def test_the_memory_that_settings_are_chosen_by_is_that_of_the_whole_model(value):
    vision = "model.vision={width: 32, layers: 4, heads: 2, patch_size: 8, image_size: 32, readout: {every: 1}}"
    config = load_recipe("lavin-7b", [*SMALL, vision])
    search = _Search(Setting((), config, 0), 1e9, DEVICE, 1, TRAINING_SET, 0.4, lambda text: None)
    setting = search.setting(4, value)
    whole = simulate(setting.config, worst_case(setting.config)).peak_bytes
    assert setting.peak_bytes == pytest.approx(whole, rel=0.02)


def test_nothing_fits_is_said_with_the_closest():
    config, found = fit(1000)
    assert found.best is None and found.command("lavin-7b", 1) is None
    assert found.smallest.peak_bytes > found.smallest.weights_bytes > 1000


def test_more_cards_split_the_layers():
    least = ("training.micro_batch=1", "training.activation_checkpointing=true")
    alone, shared = peak(*least), peak(*least, "tensor_parallel=2", gpus=2)
    assert shared < alone
    _, found = fit((alone + shared) // 2, gpus=2)
    assert found.best.config.tensor_parallel == 2


@pytest.mark.parametrize("kind, source", [("none", "cached"), ("rep", "pixels")])
def test_features_stand_in_for_a_vit_that_does_not_learn(kind, source):
    vision = "model.vision={width: 32, layers: 2, heads: 2, patch_size: 8, image_size: 32, readout: {every: 1}}"
    _, found = fit(10**9, overrides=[vision, f"model.vision_adapter={{kind: {kind}}}"])
    assert found.best.config.model.vision_source == source
