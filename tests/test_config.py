"""Recipes and overrides: everything that is wrong in one message, with the key that was meant."""

from __future__ import annotations

from typing import get_args

import pytest

from lavin_ds.config import RunConfig, Section, config_keys, load_recipe
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
        ("training.betas=[0.9]", "training.betas has too few values."),
        ("training=3", "training is a section, not a value like 3"),
        (
            "training.activation_checkpointing=abc",
            "it must be a valid boolean or be 'vision' or be a valid integer.",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(override, said):
    assert said in refused(override)


def float_keys() -> list[str]:
    """Every key of a recipe whose value may be a fraction."""

    def of(section, prefix=""):
        for name, field in section.model_fields.items():
            options = [field.annotation, *get_args(field.annotation)]
            if float in options:
                yield prefix + name
            for option in options:
                if isinstance(option, type) and issubclass(option, Section):
                    yield from of(option, f"{prefix}{name}.")

    return [*of(RunConfig), "model.llm_adapter.options.x"]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", float_keys())
def test_no_number_of_a_recipe_is_infinite_or_none(key, value):
    assert key.partition(".options")[0] in refused(f"{key}={value}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.betas=[1.5,2]", "training.betas is 1.5: it must be less than 1"),
        ("training.betas=[-0.1,0.9]", "training.betas is -0.1: it must be greater than or equal to 0"),
        ("training.betas=[0.9,.nan]", "training.betas is nan: it must be a finite number"),
        ("training.peak_lr=3", "training.peak_lr is 3: it must be less than or equal to 1"),
        ("training.weight_decay=7", "training.weight_decay is 7: it must be less than or equal to 1"),
        ("training.eps=1", "training.eps is 1: it must be less than 1"),
        ("model.llm_adapter.scale=.nan", "model.llm_adapter.scale is nan: it must be a finite number"),
        ("model.llm.norm_eps=2", "model.llm.norm_eps is 2: it must be less than 1"),
        ("model.llm.n_kv_heads=0", "model.llm.n_kv_heads is 0: it must be greater than 0"),
        ("model.llm.n_kv_heads=-2", "model.llm.n_kv_heads is -2: it must be greater than 0"),
        ("model.llm.rope_scaling.high_freq_factor=1", "high_freq_factor 1.0 must be above low_freq_factor 1.0"),
        ("data.prompt_format=QCM-ALEE", "QCM-ALEE"),
        ("model.llm_adapter.kind=mmm", "model.llm_adapter.kind: there is no 'mmm', only none, mm"),
        ("model.neck.kind=mlp", "model.neck.kind: there is no 'mlp', only lavin, linear"),
    ],
)
def test_values_without_sense_are_refused_when_the_recipe_is_read(override, said):
    assert said in refused(override)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.neck_dim=64", "model.neck.dim"),
        ("model.vision.cls_every=2", "model.vision.readout.every"),
    ],
)
def test_a_key_of_another_name_is_told_by_its_own(override, meant):
    assert meant in refused(override)


def test_every_override_that_a_recipe_takes_is_a_known_key():
    assert {"training.seed", "model.vision.width", "model.llm.rope_scaling.factor", "deepspeed"} <= set(config_keys())
