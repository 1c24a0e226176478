"""Recipes and overrides: everything that is wrong in one message, with the key that was meant."""

from __future__ import annotations

import pytest

from lavin_ds.config import config_keys, load_recipe
from lavin_ds.errors import UserError


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe("tiny", list(overrides))
    return str(error.value)


def test_all_that_is_wrong_is_told_at_once():
    said = refused("training.epoch=3", "data.overlength=maybe", "hello", "deepspeed=3", "training.seed.x=1")
    assert said.splitlines()[0] == "In recipe tiny, 5 things are wrong:"
    for clause in (
        "unknown key training.epoch: did you mean training.epochs?",
        "data.overlength is maybe: it must be 'error', 'drop' or 'shorten'",
        "override 'hello' must read key=value",
        "deepspeed is 3",
        "seed is a value, not a section",
    ):
        assert clause in said


def test_an_unknown_key_does_not_hide_keys_that_contradict_each_other():
    said = refused("training.epoch=3", "tensor_parallel=3", "training.warmup_epochs=9")
    for clause in ("training.epoch:", "n_heads 4 cannot be split over tensor_parallel 3", "must be below"):
        assert clause in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("training.sed", "training.seed"),
        ("epochs", "training.epochs"),
        ("training.lr", "training.peak_lr"),
        ("batch_size", "training.global_batch or training.micro_batch"),
        ("model.llm.layers", "model.llm.n_layers"),
        ("trainning.epochs", "training"),
        ("model.llm.rope_scaling.factr", "model.llm.rope_scaling.factor"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_may_be_meant(given, meant):
    assert f": did you mean {meant}" in refused(f"{given}=1")


def test_an_unknown_key_like_no_other_is_told_with_those_of_its_section():
    assert "unknown key data.foo; known there: prompt_format, captions" in refused("data.foo=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epochs=abc", "training.epochs is abc: it must be a valid number."),
        ("training.epochs=-1", "training.epochs is -1: it must be greater than 0."),
        ("model.llm.dim=null", "model.llm.dim is null: it must be a valid integer."),
        ("training.betas=[1]", "training.betas has too few values."),
        ("training=3", "training is a section, not a value like 3"),
        (
            "training.activation_checkpointing=abc",
            "it must be a valid boolean or be 'vision' or be a valid integer.",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(override, said):
    assert said in refused(override)


def test_every_override_that_a_recipe_takes_is_a_known_key():
    assert {"training.seed", "model.vision.width", "model.llm.rope_scaling.factor", "deepspeed"} <= set(config_keys())
