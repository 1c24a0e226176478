from collections import Counter
from dataclasses import replace

import pytest
import torch
from model_helpers import VARIANTS

from lavin_ds.config import load_recipe
from lavin_ds.data.layout import IGNORE
from lavin_ds.errors import UserError
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.meta import build_on_meta
from lavin_ds.models.trainable import frozen_parameters

MM = [
    "down_weight",
    "down_bias",
    "up_weight_0",
    "up_bias_0",
    "up_weight_1",
    "up_bias_1",
    "router_weight",
    "router_bias",
]


def test_exactly_these_parameters_learn(model):
    names = [f"llm.layers.{n}.adapters.attention.{part}" for n in range(2) for part in MM]
    names += [f"vision.blocks.{n}.adapters.attention.{part}" for n in range(2) for part in MM]
    names += [f"neck.{part}" for part in ("down_weight", "down_bias", "up_weight", "up_bias")]
    names += ["modality.weight"]
    assert list(model.trainable()) == names
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not set(names) & set(frozen_parameters(model))


@pytest.mark.parametrize("recipe, total", [("lavin-7b", 3_781_296), ("lavin-13b", 5_390_080)])
def test_the_papers_recipes_train_as_many_parameters_as_the_papers_say(recipe, total):
    model = build_on_meta(load_recipe(recipe))
    assert sum(p.numel() for p in model.trainable().values()) == total
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}


def test_initial_values_follow_from_the_seed_and_the_name_alone(config):
    first, second, other = Lavin(config), Lavin(config), Lavin(config)
    torch.manual_seed(1)
    first.reset_trainable(5)
    second.reset_trainable(5)
    other.reset_trainable(6)
    for name, parameter in first.trainable().items():
        assert torch.equal(parameter, second.trainable()[name])
    assert not torch.equal(first.modality.weight, other.modality.weight)
    one, two = (first.llm.layers[n].adapters["attention"].down_weight for n in range(2))
    assert not torch.equal(one, two)


def losses(model, batch):
    total, count = model(batch)
    return total.item(), count


def test_a_samples_loss_depends_neither_on_order_nor_on_padding_nor_on_its_neighbours(model, make_batch):
    rows = [(11, 0), (17, -1), (9, 1), (14, 0), (12, -1)]
    alone = [losses(model, make_batch([row])) for row in rows]
    want = sum(total for total, _ in alone), sum(count for _, count in alone)
    for batch in (make_batch(rows), make_batch(rows[::-1]), make_batch(rows, padding=7)):
        total, count = losses(model, batch)
        assert count == want[1]
        assert total == pytest.approx(want[0], rel=1e-5)


def test_the_image_matters_to_its_own_sample(model, make_batch):
    with torch.no_grad():
        first, second = (model.hidden(make_batch([(11, image)], seed=0)) for image in (0, 1))
    assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-3)


def test_labels_are_predicted_from_the_position_before_them(model, make_batch):
    batch = make_batch([(11, 0), (8, -1)])
    with torch.no_grad():
        log_p = model.llm.logits(model.hidden(batch)).log_softmax(-1)
    want = 0.0
    for b, t in (batch.labels_BT != IGNORE).nonzero().tolist():
        want -= log_p[b, t - 1, batch.labels_BT[b, t]].item()
    total, count = losses(model, batch)
    assert total == pytest.approx(want, rel=1e-5) and count == int((batch.labels_BT != IGNORE).sum())


@pytest.mark.parametrize("rows", [[(11, -1), (8, -1)], [(11, 0), (8, 1)], [(11, 0), (8, -1)]])
def test_every_trainable_parameter_has_a_gradient_whatever_is_in_the_batch(model, make_batch, rows):
    total, _ = model(make_batch(rows))
    total.backward()
    assert [name for name, p in model.trainable().items() if p.grad is None] == []
    sees = any(image >= 0 for _, image in rows)
    assert bool(model.neck.up_weight.grad.any()) == sees
    assert all(p.grad is None for p in frozen_parameters(model).values())


def test_a_batch_without_labels_has_loss_zero_and_gradients_zero(model, make_batch):
    batch = make_batch([(11, 0)])
    batch = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE))
    total, count = model(batch)
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.trainable().values())


@pytest.mark.parametrize("compat", [False, True])
def test_activation_checkpointing_changes_no_gradient(config, fill, make_batch, compat):
    gradients = []
    for checkpointing in (False, True, "vision", 1):
        model = fill(Lavin(config, compat, activation_checkpointing=checkpointing)).train()
        torch.manual_seed(0)  # dropout
        total, _ = model(make_batch([(11, 0), (8, -1), (9, 1)]))
        total.backward()
        gradients.append({name: p.grad for name, p in model.trainable().items()})
    for name, gradient in gradients[0].items():
        for others in gradients[1:]:
            torch.testing.assert_close(gradient, others[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value, layers, vision", [(False, 0, 0), ("vision", 0, 2), (1, 1, 2), (True, 2, 2)])
def test_activation_checkpointing_recomputes_the_blocks_it_names(config, fill, make_batch, value, layers, vision):
    model = fill(Lavin(config, activation_checkpointing=value)).train()
    runs = Counter()
    for name, module in model.named_modules():
        if name.endswith(("attention_norm", "ln_1")):  # once in every block
            module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    model(make_batch([(11, 0), (8, -1)]))[0].backward()
    assert [runs[f"llm.layers.{n}.attention_norm"] for n in range(2)] == [2] * layers + [1] * (2 - layers)
    assert [runs[f"vision.blocks.{n}.clip.ln_1"] for n in range(2)] == [2 if vision else 1] * 2


def test_what_to_recompute_is_read_from_the_recipe_and_checked():
    for word, value in [("true", True), ("false", False), ("vision", "vision"), ("1", 1), ("40", 40)]:
        read = load_recipe("lavin-13b", [f"training.activation_checkpointing={word}"]).training.activation_checkpointing
        assert (read, type(read)) == (value, type(value))
    for word in ("41", "-1", "layers"):
        with pytest.raises(UserError, match="activation_checkpointing"):
            load_recipe("lavin-13b", [f"training.activation_checkpointing={word}"])


@pytest.fixture(params=VARIANTS)
def variant(request, fill):
    """A model of each adapter kind, before the feed-forward too where it can stand there."""
    return fill(Lavin(VARIANTS[request.param])).eval()


def test_every_kind_of_adapter_learns_in_every_place_whatever_is_in_the_batch(variant, make_batch):
    for rows in ([(11, -1), (8, -1)], [(11, 0), (8, -1)]):
        variant.zero_grad()
        variant(make_batch(rows))[0].backward()
        assert [name for name, p in variant.trainable().items() if p.grad is None] == []
    # The last layer's router alone may have a gradient too small to see; no matrix may have none.
    dead = [name for name, p in variant.trainable().items() if not p.grad.any()]
    assert dead == [] and all(p.grad is None for p in frozen_parameters(variant).values())
    assert (variant.modality is not None) == KINDS[variant.config.llm_adapter.kind].load().routed


@torch.no_grad()
def test_cached_decoding_gives_the_uncached_logits(variant, make_batch):
    model = variant
    batch, steps = make_batch([(11, 0), (17, -1), (9, 1)]), 5
    lengths, (x_BTD, modality_B) = batch.lengths_B.tolist(), model.embed(batch)
    cache = KVCache(model.config.llm, len(lengths), max(lengths) + steps, torch.float32, "cpu")
    modality_MD = model.modality() if model.modality is not None else None
    x_ND = torch.cat([x_TD[:length] for x_TD, length in zip(x_BTD, lengths, strict=True)])
    reads, decoded, ids = Reads(cache, (0, 1, 2), lengths), [], []
    for _ in range(steps):
        h_ND = model.llm(x_ND[None], modality_MD, modality_B, reads=reads)[0]
        decoded.append(model.llm.logits(h_ND[torch.tensor(reads.lengths).cumsum(0) - 1]))
        ids.append(decoded[-1].argmax(-1))
        x_ND, reads = model.llm.embed(ids[-1]), Reads(cache, (0, 1, 2), (1, 1, 1))
    for b, length in enumerate(batch.lengths_B.tolist()):
        row = make_batch([[(11, 0), (17, -1), (9, 1)][b]])
        whole = torch.cat([row.ids_BT, torch.stack(ids)[:, b][None]], dim=1)
        row = replace(row, ids_BT=whole, labels_BT=torch.full_like(whole, IGNORE))
        want = model.llm.logits(model.hidden(row))[0, length - 1 : length - 1 + steps]
        torch.testing.assert_close(torch.stack(decoded)[:, b], want, rtol=1e-4, atol=1e-4)


def test_a_text_only_model_reads_every_sample_as_text(config, fill, make_batch):
    model = fill(Lavin(config.model_copy(update={"vision": None}))).eval()
    assert model.vision is None and model.neck is None
    batch = make_batch([(11, -1), (8, -1)])
    assert losses(model, batch)[0] > 0
    assert model.modality is not None


def test_a_base_without_adapters_has_nothing_to_learn(config, make_batch):
    none = config.llm_adapter.model_copy(update={"kind": "none"})
    model = Lavin(config.model_copy(update={"vision": None, "llm_adapter": none}))
    assert model.trainable() == {} and model.modality is None


def test_without_a_router_there_is_no_modality_token(config, fill, make_batch):
    rep = config.llm_adapter.model_copy(update={"kind": "rep"})
    model = fill(Lavin(config.model_copy(update={"llm_adapter": rep}))).eval()
    assert model.modality is None
    rows = [(11, 0), (17, -1)]
    total = sum(losses(model, make_batch([row]))[0] for row in rows)
    assert losses(model, make_batch(rows))[0] == pytest.approx(total, rel=1e-5)


def test_in_bf16_frozen_and_trainable_keep_their_dtypes(config, fill, make_batch):
    model = fill(Lavin(config.model_copy(update={"frozen_dtype": "bf16"}))).train()
    assert {p.dtype for p in frozen_parameters(model).values()} == {torch.bfloat16}
    total, _ = model(make_batch([(11, 0), (8, -1)]))
    total.backward()
    assert total.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trainable().values())
