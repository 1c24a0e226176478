"""Samples packed into one row are computed as if each had a row of its own."""

from dataclasses import replace

import pytest
import torch
from model_helpers import fill, make_batch, pack

from lavin_ds.models.lavin import Lavin

TOLERANCE = 1e-5
MIXES = {
    "text and images": [(11, 0), (17, -1), (9, 1), (6, -1), (12, 0)],
    "text alone": [(11, -1), (17, -1), (4, -1)],
    "images alone": [(9, 1), (13, 0)],
    "one sample": [(10, 0)],
}


def loss_and_gradients(model, batch):
    model.zero_grad()
    total, count = model(batch)
    total.backward()
    return total.item(), count, {name: p.grad.clone() for name, p in model.trainable().items()}


@pytest.mark.parametrize("mix", MIXES)
def test_packed_loss_and_gradients_are_those_of_padded_rows(model, mix):
    padded = make_batch(MIXES[mix])
    loss, count, gradients = loss_and_gradients(model, padded)
    packed_loss, packed_count, packed_gradients = loss_and_gradients(model, pack(padded))
    assert packed_loss == pytest.approx(loss, rel=TOLERANCE) and packed_count == count
    for name, gradient in gradients.items():
        difference = (packed_gradients[name] - gradient).norm()
        assert difference <= TOLERANCE * gradient.norm().clamp(min=1e-3), name


def test_activation_checkpointing_takes_packed_batches(config):
    model = fill(Lavin(config, activation_checkpointing=True)).eval()
    padded = make_batch(MIXES["text and images"])
    loss, _, gradients = loss_and_gradients(model, padded)
    packed_loss, _, packed_gradients = loss_and_gradients(model, pack(padded))
    assert packed_loss == pytest.approx(loss, rel=TOLERANCE)
    name = "llm.layers.0.adapters.attention.down_weight"
    torch.testing.assert_close(packed_gradients[name], gradients[name], rtol=1e-4, atol=1e-6)


def test_a_packed_sample_does_not_feel_its_neighbour(model):
    batch = pack(make_batch(MIXES["text and images"]))
    first = batch.packed[0]
    hidden = model.hidden(batch)
    other_ids = batch.ids_BT.clone()
    other_ids[:, :first] = 5
    changed = model.hidden(replace(batch, ids_BT=other_ids))
    assert not torch.allclose(changed[:, :first], hidden[:, :first])
    assert torch.equal(changed[:, first:], hidden[:, first:])
