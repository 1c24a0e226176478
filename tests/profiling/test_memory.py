"""Simulated memory against the same step on real tensors, as the tracker and as torch's allocator see it."""

import dataclasses
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lavin_ds.config import load_recipe
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.profiling.memory import (
    Workload,
    make_batch,
    measured,
    simulate,
    summarise,
    trace_step,
    worst_case,
)
from lavin_ds.profiling.zero import zero_share

WORKLOAD = Workload(samples=3, length=96, image_fraction=2 / 3, labelled_fraction=0.5)


def real_model(config) -> Lavin:
    initialize_single_process()
    model = Lavin(config.model, activation_checkpointing=config.training.activation_checkpointing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    return model


@pytest.mark.parametrize("fixture", ["tiny", "tiny_checkpointed"])
def test_a_simulated_step_is_the_real_one(fixture, request):
    """Same peaks by component, same operators in the same order with the same FLOPs and bytes."""
    config = request.getfixturevalue(fixture).model_copy(update={"deepspeed": "zero0"})
    real = summarise(trace_step(real_model(config), make_batch(config.model, WORKLOAD)), WORKLOAD)
    fake = simulate(config, WORKLOAD)
    assert fake.phases == real.phases
    assert fake.operations == real.operations
    assert fake.flops("forward") > 0 and fake.flops("backward") > 0


@pytest.mark.parametrize("fixture", ["tiny", "tiny_checkpointed"])
def test_the_peak_is_that_of_the_allocator(fixture, request):
    config = request.getfixturevalue(fixture).model_copy(update={"deepspeed": "zero0"})
    simulated = simulate(config, WORKLOAD)
    own = simulated.components["activations"] + simulated.components["temporaries"]
    own += simulated.components["logits"] + simulated.components["gradients"]
    assert own == pytest.approx(allocator_peak(config), rel=0.02)


def allocator_peak(config) -> int:
    """Bytes that torch's CPU allocator holds at most during forward and backward, above what it held before."""
    model, batch = real_model(config).train(), make_batch(config.model, WORKLOAD)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss, labels = model(batch)
        (loss / labels).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def test_checkpointing_trades_activations_for_arithmetic(tiny, tiny_checkpointed):
    plain, checkpointed = simulate(tiny, WORKLOAD), simulate(tiny_checkpointed, WORKLOAD)
    assert checkpointed.components["activations"] < plain.components["activations"] / 2
    assert checkpointed.flops("backward") > plain.flops("backward")
    assert checkpointed.flops("forward") == plain.flops("forward")


def test_frozen_weights_have_no_gradient_and_no_moment(tiny):
    bf16 = tiny.model.model_copy(update={"frozen_dtype": "bf16"})
    simulation = simulate(tiny.model_copy(update={"model": bf16}), WORKLOAD)
    update = simulation.phases["update"]
    # With an fp32 base autograd hands out E_m's gradient as two rows of the whole [N, D], kept alive by them.
    assert update["gradients"] == update["adapters"]
    assert simulation.components["optimizer"] == pytest.approx(2 * simulation.components["adapters"], rel=0.01)
    assert set(simulation.phases) == {"forward", "backward", "update"}
    assert simulation.peak_bytes == sum(simulation.components.values())


def test_a_batch_without_images_and_one_without_labels(tiny):
    text = simulate(tiny, dataclasses.replace(WORKLOAD, image_fraction=0.0))
    assert text.flops() < simulate(tiny, WORKLOAD).flops()
    assert simulate(tiny, dataclasses.replace(WORKLOAD, labelled_fraction=0.0)).components["logits"] == 0


def test_zero_divides_the_moments_and_keeps_its_buckets():
    config = load_recipe("lavin-7b", ["deepspeed=zero2"])
    one, eight = zero_share(config, 1, 3_781_296), zero_share(config, 8, 3_781_296)
    assert (one.optimizer, eight.optimizer) == (1.0, 1 / 8)
    assert one.buffers - eight.buffers == pytest.approx(2 * 4 * 3_781_296 * 7 / 8, abs=16)
    none = zero_share(load_recipe("lavin-7b", ["deepspeed=zero0"]), 8, 3_781_296)
    assert (none.optimizer, none.buffers) == (1.0, 0)


def test_worst_case_is_the_recipes_longest_micro_batch(tiny):
    assert worst_case(tiny) == Workload(4, 512, 1.0, 1.0)
    assert worst_case(load_recipe("ablation-text"), micro_batch=2, length=64) == Workload(2, 64, 0.0, 1.0)


def test_impossible_workloads_are_refused(tiny):
    with pytest.raises(UserError, match="labelled_fraction is 1.5"):
        Workload(1, 10, labelled_fraction=1.5)
    with pytest.raises(UserError, match="no room for 2 visual tokens"):
        make_batch(tiny.model, Workload(1, 4))


def test_measured_reads_what_a_run_recorded(tmp_path):
    with pytest.raises(UserError, match="not complete"):
        measured(tmp_path)
    summary = {
        "steps": 3,
        "samples": 12,
        "tokens": 900,
        "seconds": 4.5,
        "peak_rss_bytes": 800_000_000,
        "peak_device_bytes": None,
        "trainable_parameters": 1234,
        "final_loss": 1.0,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "adapter.safetensors").write_bytes(b"x" * 5000)
    assert measured(tmp_path).peak_bytes == 800_000_000
    assert measured(tmp_path).adapter_bytes == 5000
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="cannot be read"):
        measured(tmp_path)


@pytest.mark.slow
def test_13b_is_simulated_without_its_memory():
    simulation = simulate(load_recipe("lavin-13b"), worst_case(load_recipe("lavin-13b")))
    assert simulation.components["frozen"] == pytest.approx(26.64e9, rel=0.001)
    assert 40e9 < simulation.peak_bytes < 46e9
