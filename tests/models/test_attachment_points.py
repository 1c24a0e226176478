"""A method from outside: one file like this one and one `register`, nothing of the package touched."""

from __future__ import annotations

import pytest
import torch
from model_helpers import CONFIG, fill, make_batch
from pydantic import ValidationError

from lavin_ds.config import ModelConfig, Section
from lavin_ds.models.adapters import KINDS, AdapterKind, register
from lavin_ds.models.adapters.base import Adapter
from lavin_ds.models.lavin import Lavin

ROWS = [(11, 0), (8, -1), (9, 1)]


class ToyOptions(Section):
    power: int = 2


class ToyAdapter(Adapter):
    """g * z^power: what is added beside the FFN; anywhere else z is added to it."""

    def __init__(self, width, config):
        super().__init__(width, config)
        self.power = ToyOptions(**config.options).power

    def shapes(self, width):
        return {"gain": (width,)}

    def forward(self, z_ND, token_MD, owner_N):
        return self.gain * z_ND**self.power


@pytest.fixture
def toy():
    points = ("attention", "ffn", "after_attention", "after_ffn", "beside_ffn")
    register("toy", AdapterKind(ToyAdapter, ToyOptions, points))
    yield
    del KINDS["toy"]


def model_with(*points: str, **options) -> Lavin:
    adapter = {"kind": "toy", "at": points, "options": options}
    return fill(Lavin(ModelConfig.model_validate(CONFIG.model_dump() | {"llm_adapter": adapter}))).eval()


def plain_block(block, x_ND, rows, turns, power):
    """The block's equation in so many words, with the toy's formula at each point that has one."""

    def toy(point, z_ND, otherwise):
        return block.adapters[point].gain * z_ND.pow(power) if point in block.adapters else otherwise

    z = block.attention_norm(x_ND)
    y = block.attention(toy("attention", z, z), rows, turns)
    x = x_ND + toy("after_attention", y, y)
    z = block.ffn_norm(x)
    z = toy("ffn", z, z)
    y = block.feed_forward(z)
    return x + toy("after_ffn", y, y) + toy("beside_ffn", z, torch.zeros_like(z))


@pytest.mark.parametrize(
    "points", [("attention",), ("ffn",), ("after_attention", "after_ffn"), ("beside_ffn",), ("ffn", "beside_ffn")]
)
def test_a_toy_adapter_at_any_point_trains_by_its_own_formula(toy, points):
    ours, plain = model_with(*points, power=3), model_with(*points, power=3)
    for block in plain.llm.layers:
        block.forward = lambda x_ND, rows, rotations, layer, block=block: plain_block(block, x_ND, rows, rotations, 3)
    losses = []
    for model in (ours, plain):
        optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
        total, count = model(make_batch(ROWS))
        (total / count).backward()
        losses.append(total)
        optimizer.step()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    theirs, attached = plain.trainable(), [f"adapters.{point}.gain" for point in points]
    for name, parameter in ours.trainable().items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)
    gains = {name: p for name, p in ours.trainable().items() if name.endswith("gain")}
    assert {name.partition(".adapters.")[2] for name in gains} == {name.removeprefix("adapters.") for name in attached}
    assert all(p.grad.any() for p in gains.values())


def test_a_kinds_own_options_are_checked_by_the_kind(toy):
    for options, said in [({"power": "x"}, "options.power of kind toy"), ({"gate": 1}, "options.gate of kind toy")]:
        with pytest.raises(ValidationError, match=said):
            model_with("ffn", **options)


def test_no_kind_takes_the_name_of_another():
    with pytest.raises(ValueError, match="an adapter kind mm already"):
        register("mm", AdapterKind(ToyAdapter))
