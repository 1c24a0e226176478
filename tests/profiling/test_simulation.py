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
from lavin_ds.profiling.finished_run import read_measured
from lavin_ds.profiling.simulation import simulate, summarise, trace_step
from lavin_ds.profiling.workload import Workload, make_batch, worst_case

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
    real = summarise(
        trace_step(real_model(config), make_batch(config.model, WORKLOAD, config.training.packing)),
        WORKLOAD,
        accumulates=True,
    )
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
    model, batch = real_model(config).train(), make_batch(config.model, WORKLOAD, config.training.packing)
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


def test_zero_divides_the_moments_and_holds_its_buckets_in_the_backward_pass(tiny):
    """DeepSpeed's buckets come with the first gradient, behind the peak at the loss."""
    zero2, zero0 = (tiny.model_copy(update={"deepspeed": name}) for name in ("zero2", "zero0"))
    plain, one, two = simulate(zero0, WORKLOAD), simulate(zero2, WORKLOAD), simulate(zero2, WORKLOAD, 2)
    adapters = plain.components["adapters"]
    for component in ("zero", "optimizer"):
        assert one.phases["forward"][component] == pytest.approx(2 * two.phases["forward"][component], rel=0.01)
    buckets = 2 * 4 * 5_000_000
    assert one.phases["backward"]["zero"] == buckets + 2 * adapters  # the fp32 copy, and gradients that accumulate
    assert one.phases["forward"]["zero"] == 2 * adapters
    assert plain.phases["forward"]["zero"] == adapters  # gradients alone


def test_tensor_parallel_ranks_hold_and_compute_their_slices(tiny):
    llm = tiny.model.llm.model_copy(update={"vocab_size": 4096})
    tiny = tiny.model_copy(update={"model": tiny.model.model_copy(update={"llm": llm})})
    whole = simulate(tiny, WORKLOAD, 2)
    half = simulate(tiny.model_copy(update={"tensor_parallel": 2}), WORKLOAD, 2)
    assert half.components["adapters"] == whole.components["adapters"]
    assert (
        whole.components["frozen"] / 2 < half.components["frozen"] < 0.6 * whole.components["frozen"]
    )  # the ViT stays
    assert half.components["logits"] == pytest.approx(whole.components["logits"] / 2, rel=0.01)
    assert half.flops() < 0.7 * whole.flops()
    # Every layer sums over the ranks twice forward and, but for the inputs that need no gradient, twice backward.
    reduced = [o for o in half.operations if o.name == "allreduce_"]
    assert len([o for o in reduced if o.phase == "forward"]) >= 2 * llm.n_layers
    assert not [o for o in whole.operations if o.name == "allreduce_"]
    with pytest.raises(UserError, match="multiple of 2 ranks"):
        simulate(tiny.model_copy(update={"tensor_parallel": 2}), WORKLOAD, 3)


def test_worst_case_is_the_recipes_longest_micro_batch(tiny):
    assert worst_case(tiny) == Workload(4, 512, 1.0, 1.0)
    assert worst_case(load_recipe("ablation-text", ["training.micro_batch=2"]), length=64) == Workload(2, 64, 0.0, 1.0)


def test_no_rank_gets_more_samples_than_its_share_of_the_global_batch():
    recipe = load_recipe("lavin-7b", ["training.micro_batch=8"])
    samples = {gpus: worst_case(recipe, gpus).samples for gpus in (1, 4, 8, 16, 32)}
    assert samples == {1: 8, 4: 8, 8: 4, 16: 2, 32: 1}
    split = recipe.model_copy(update={"tensor_parallel": 2})
    assert worst_case(split, 16).samples == 4


def test_impossible_workloads_are_refused(tiny):
    with pytest.raises(UserError, match="labelled_fraction is 1.5"):
        Workload(1, 10, labelled_fraction=1.5)
    with pytest.raises(UserError, match="no room for 2 visual tokens"):
        make_batch(tiny.model, Workload(1, 4))


def test_measured_reads_what_a_run_recorded(tmp_path):
    with pytest.raises(UserError, match="not complete"):
        read_measured(tmp_path)
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
    assert read_measured(tmp_path).peak_bytes == 800_000_000
    assert read_measured(tmp_path).adapter_bytes == 5000
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="cannot be read"):
        read_measured(tmp_path)


@pytest.mark.slow
def test_13b_is_simulated_without_its_memory():
    simulation = simulate(load_recipe("lavin-13b"), worst_case(load_recipe("lavin-13b")))
    assert simulation.components["frozen"] == pytest.approx(26.64e9, rel=0.001)
    assert 36e9 < simulation.peak_bytes < 40e9
