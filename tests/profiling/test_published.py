"""The authors' step against ours: the same function, at the cost that their paper reports."""

import dataclasses

import pytest
import torch

from lavin_ds.config import load_recipe
from lavin_ds.data.layout import IGNORE
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.published.model import SAVINGS, PublishedLavin, PublishedOptions, published_model
from lavin_ds.profiling.simulation import simulate, summarise, trace_step
from lavin_ds.profiling.workload import Workload, make_batch

PUBLISHED = PublishedOptions(pad_to=64)
WORKLOAD = Workload(samples=4, length=40, image_fraction=0.5, labelled_fraction=0.5)


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight"))
            parameter.copy_(is_norm + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()  # no dropout


def ragged_batch(config):
    """Two samples with an image and two without, of different lengths."""
    batch = make_batch(config.model, WORKLOAD)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, 512, batch.ids_BT.shape, generator=generator)
    labels_BT = torch.where(batch.labels_BT == IGNORE, IGNORE, ids_BT)
    for b, length in enumerate([39, 30, 35, 27]):
        ids_BT[b, length:], labels_BT[b, length:] = 0, IGNORE
    images = torch.randint(0, 256, batch.images_NHWC.shape, dtype=torch.uint8, generator=generator)
    order = [0, 2, 1, 3]  # images first would leave text-only samples nothing to route in compat mode
    return dataclasses.replace(
        batch, ids_BT=ids_BT, labels_BT=labels_BT, image_B=batch.image_B[order], images_NHWC=images
    )


def loss_and_gradients(model, batch):
    total, count = model(batch)
    total.backward()
    return total.detach(), count, {name: p.grad for name, p in model.trainable().items()}


VARIANTS = {"as published": PUBLISHED, "everything saved": PUBLISHED.without(*SAVINGS)}
VARIANTS |= {f"without {name}": PUBLISHED.without(name) for name in SAVINGS}


@pytest.mark.parametrize("compat", [False, True])
def test_it_computes_our_loss_and_gradients_from_our_weights(tiny, compat):
    initialize_single_process()
    llm = tiny.model.llm.model_copy(update={"n_kv_heads": 2})
    model = tiny.model.model_copy(update={"llm": llm})
    batch, ours = ragged_batch(tiny), filled(Lavin(model, compat))
    loss, count, gradients = loss_and_gradients(ours, batch)
    for name, options in VARIANTS.items():
        theirs = PublishedLavin(model, options, compat).eval()
        theirs.load_state_dict(ours.state_dict())
        got = loss_and_gradients(theirs, batch)
        assert got[1] == count, name
        torch.testing.assert_close(got[0], loss, rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")
        for parameter, gradient in gradients.items():
            error = (got[2][parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-4, (name, parameter)


@pytest.mark.parametrize("recipe", ["ablation-text", "ablation-vision"])
def test_adapters_without_a_router_and_text_only_runs_have_a_published_step_too(tiny, recipe):
    initialize_single_process()
    shape = {"llm": tiny.model.llm, "frozen_dtype": "fp32", "vision_source": "pixels"}
    model = load_recipe(recipe).model
    model = model.model_copy(update=shape | ({"vision": tiny.model.vision} if model.vision else {}))
    batch, ours = ragged_batch(tiny), filled(Lavin(model))
    theirs = PublishedLavin(model, PUBLISHED).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(batch)[0], ours(batch)[0], rtol=1e-5, atol=0)


def test_every_saving_takes_memory_off_and_all_of_them_leave_our_step(tiny):
    initialize_single_process()

    def activations(model):
        step = summarise(trace_step(filled(model), ragged_batch(tiny)), WORKLOAD)
        return step.peak_bytes - sum(step.components[name] for name in ("frozen", "adapters", "optimizer"))

    ours = activations(Lavin(tiny.model))
    published, *each, everything = (
        activations(PublishedLavin(tiny.model, PUBLISHED.without(*names)))
        for names in ((), *zip(SAVINGS, strict=True), SAVINGS)
    )
    assert all(saved < published for saved in each), dict(zip(SAVINGS, each, strict=True))
    assert everything == pytest.approx(ours, rel=0.03)
    assert published > 2 * ours


def test_the_simulated_published_step_is_the_real_one(tiny):
    initialize_single_process()
    training = tiny.training.model_copy(update={"packing": False})
    config = tiny.model_copy(update={"deepspeed": "zero0", "training": training})
    batch = make_batch(tiny.model, WORKLOAD)  # with as many labels as the simulated one: their indices count as memory
    tracker = trace_step(filled(PublishedLavin(tiny.model, PUBLISHED)), batch)
    real = summarise(tracker, WORKLOAD, accumulates=True)
    fake = simulate(config, WORKLOAD, make=published_model(PUBLISHED))
    assert fake.phases == real.phases and fake.operations == real.operations


@pytest.mark.parametrize("recipe, paper", [("lavin-7b", 33.9), ("lavin-13b", 55.9)])
def test_the_papers_memory_is_that_of_their_step(recipe, paper):
    """Within 6% from the tensors alone."""
    assert gigabytes(recipe, PublishedOptions()) == pytest.approx(paper, rel=0.06)


def gigabytes(recipe, options) -> float:
    """The peak at full size. Layers are alike, and so are blocks of the ViT: the peak is linear in their numbers."""

    def peak(layers, blocks):
        shape = [f"model.llm.n_layers={layers}", f"model.vision.layers={blocks}"]
        config = load_recipe(recipe, ["model.frozen_dtype=fp16", "deepspeed=zero0", "training.packing=false", *shape])
        simulation = simulate(config, Workload(4, 512), make=published_model(options))
        assert simulation.moment.startswith("backward, at _log_softmax_backward")  # of every size alike
        return simulation.peak_bytes

    full, base = load_recipe(recipe).model, peak(1, 4)
    layers, blocks = peak(2, 4) - base, (peak(1, 8) - base) / 4
    return (base + (full.llm.n_layers - 1) * layers + (full.vision.layers - 4) * blocks) / 1e9


def test_what_the_authors_do_not_have_is_refused(tiny):
    other = tiny.model.model_copy(
        update={"llm_adapter": tiny.model.llm_adapter.model_copy(update={"kind": "loha_silu"})}
    )
    with pytest.raises(UserError, match="no adapters of kind loha_silu"):
        PublishedLavin(other)
    with pytest.raises(UserError, match="no cached visual features"):
        PublishedLavin(tiny.model.model_copy(update={"vision_source": "cached"}))


def test_a_saving_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no saving attention; there are pad_to, eager_attention"):
        PUBLISHED.without("attention")


def test_a_sample_beyond_the_padding_is_refused(tiny):
    initialize_single_process()
    model = filled(PublishedLavin(tiny.model, PublishedOptions(pad_to=32)))
    with pytest.raises(ValueError, match="39 ids does not fit into pad_to 31"):
        model(ragged_batch(tiny))
