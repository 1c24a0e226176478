"""Necks: equations, the number of visual tokens, and one from outside: a file like this and one `register`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_helpers import CONFIG, VISUAL_START, make_batch
from pydantic import ValidationError
from torch import nn

from lavin_ds.config import ModelConfig, Section
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.necks import KINDS, NeckKind, register
from lavin_ds.models.necks.base import Neck

PATCHES = {"rows": "patches", "block": 1}  # 4 of them: 16 pixels a side in patches of 8


class PoolingOptions(Section):
    rows: int = 2


class PoolingNeck(Neck):
    """A visual token of every `rows` neighbouring rows: their mean, projected."""

    def __init__(self, config, vision, width):
        super().__init__(config, vision, width)
        self.pooled = PoolingOptions(**config.options).rows
        self.weight = nn.Parameter(torch.empty(width, vision.width))

    def forward(self, x_NFW):
        return x_NFW.unflatten(1, (-1, self.pooled)).mean(2) @ self.weight.t()


@pytest.fixture
def pooling():
    def visual_tokens(config, rows):
        return rows // PoolingOptions(**config.options).rows

    register("pooling", NeckKind(PoolingNeck, PoolingOptions, visual_tokens))
    yield
    del KINDS["pooling"]


def config_with(neck: dict, readout: dict) -> ModelConfig:
    raw = CONFIG.model_dump()
    return ModelConfig.model_validate(raw | {"neck": neck, "vision": raw["vision"] | {"readout": readout}})


def test_a_neck_makes_the_number_of_visual_tokens_that_a_sample_has_room_for():
    assert config_with({"kind": "lavin"}, {"every": 1}).visual_tokens == 2
    assert config_with({"kind": "linear"}, PATCHES).visual_tokens == 4
    assert config_with({"kind": "linear"}, PATCHES | {"rows": "all"}).visual_tokens == 5
    assert config_with({"kind": "linear"}, {"every": 1, "rows": "patches"}).visual_tokens == 8


def test_the_linear_neck_is_one_projection_of_the_patches(fill):
    config = config_with({"kind": "linear"}, PATCHES)
    model = fill(Lavin(config)).eval()
    assert {name for name in model.trainable() if name.startswith("neck.")} == {"neck.weight", "neck.bias"}
    assert len(model.vision.blocks) == 1  # the second would not be seen
    batch = make_batch([(11, 0), (8, -1)])
    x_BTD, _ = model.embed(batch)
    rows = model.vision(batch.images_NHWC)
    assert rows.shape == (1, 4, 32)
    want = rows[0] @ model.neck.weight.t() + model.neck.bias
    torch.testing.assert_close(x_BTD[0, VISUAL_START : VISUAL_START + 4], want, rtol=1e-5, atol=1e-6)


def test_a_toy_neck_trains_by_its_own_formula_and_also_without_images(pooling, fill):
    config = config_with({"kind": "pooling", "options": {"rows": 2}}, PATCHES)
    assert config.visual_tokens == 2
    model = fill(Lavin(config)).eval()
    batch = make_batch([(11, 0), (8, -1)])
    rows = model.vision(batch.images_NHWC)[0]
    want = torch.stack([(rows[0] + rows[1]) / 2, (rows[2] + rows[3]) / 2]) @ model.neck.weight.t()
    x_BTD, _ = model.embed(batch)
    torch.testing.assert_close(x_BTD[0, VISUAL_START : VISUAL_START + 2], want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(want)
    (got,) = torch.autograd.grad((x_BTD[0, VISUAL_START : VISUAL_START + 2] * upstream).sum(), model.neck.weight)
    (plain,) = torch.autograd.grad((want * upstream).sum(), model.neck.weight)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
    for rows_of_batch in ([(11, 0), (8, -1)], [(8, -1)]):
        model.zero_grad()
        total, count = model(make_batch(rows_of_batch))
        (total / count).backward()
        assert model.neck.weight.grad is not None  # with no image it is zero, and there for ZeRO's collectives
    torch.optim.SGD(model.trainable().values(), lr=0.1).step()


@pytest.mark.parametrize("kind", ["lavin", "linear"])
def test_cached_features_go_through_any_neck(fill, kind):
    pixels = fill(Lavin(config_with({"kind": kind, "dim": 8}, PATCHES).model_copy(update={"vision_adapter": NONE})))
    cached = Lavin(pixels.config.model_copy(update={"vision_source": "cached"})).eval()
    cached.load_state_dict({k: v for k, v in pixels.state_dict().items() if not k.startswith("vision.")})
    batch = make_batch([(11, 0), (8, -1)])
    features = pixels.eval().vision(batch.images_NHWC)
    of_features = replace(batch, images_NHWC=None, features_NFW=features)
    assert F.l1_loss(cached(of_features)[0], pixels(batch)[0]) < 1e-5


NONE = type(CONFIG.vision_adapter)()


@pytest.mark.parametrize(
    ("neck", "readout", "said"),
    [
        ({"kind": "perceiver"}, {"every": 1}, "there is no 'perceiver', only lavin, linear"),
        ({"options": {"slots": 3}}, {"every": 1}, "kind lavin has no options, but slots is given"),
        ({}, {"every": 1, "block": 2}, "give either every or block"),
        ({}, {"rows": "all"}, "give either every or block"),
        ({}, {"block": 3}, "readout asks for block 3, but there are 2 layers"),
        ({}, {"every": 3}, "readout asks for block 3, but there are 2 layers"),
    ],
)
def test_what_cannot_be_read_out_is_refused_in_words(neck, readout, said):
    with pytest.raises(ValidationError, match=said):
        config_with(neck, readout)
