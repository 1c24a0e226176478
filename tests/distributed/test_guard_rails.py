"""A step without a finite loss or gradient changes nothing on any rank; too many in a row end the run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lavin_ds.config import load_recipe
from lavin_ds.data.sampler import global_batch_indices
from lavin_ds.data.shards import ShardReader
from lavin_ds.training.checkpoint import list_steps


@dataclass(frozen=True)
class Poison:
    ids: set[str]  # of the samples that hold the poisoned token
    steps: list[int]  # that draw one of them, from 1


@pytest.fixture(scope="module")
def poison(workplace) -> Poison:
    """A base with one embedding of NaN, of a token that one or two samples hold: they poison their batches."""
    config = load_recipe(str(workplace.recipe))
    reader = ShardReader(workplace.folder / "shards", "train")
    tokens = [set(reader.row(int(i)).token_ids.tolist()) for i in reader.trainable]
    holders = {token: [i for i, own in enumerate(tokens) if token in own] for token in set().union(*tokens)}
    batches = [global_batch_indices(len(tokens), 8, config.training.seed, step).tolist() for step in range(20)]
    steps = {
        token: [step + 1 for step, batch in enumerate(batches) if set(batch) & set(samples)]
        for token, samples in holders.items()
        if len(samples) <= 2
    }
    # Behind the first checkpoint, at step 7, and with healthy steps after them.
    rare = min(token for token, drawn in steps.items() if min(drawn) >= 8 and max(drawn) <= 17)
    shutil.copytree(workplace.folder / "llama", workplace.folder / "poisoned")
    file = workplace.folder / "poisoned" / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.weight"][rare] = math.nan
    save_file(state, file, metadata={"format": "pt"})
    return Poison({reader.row(int(reader.trainable[i])).id for i in holders[rare]}, steps[rare])


def overrides(workplace, stage: int, tmp_path, *more: str) -> tuple[str, ...]:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = tmp_path / f"zero{stage}.json"
    config.write_text(json.dumps({"zero_optimization": zero}))
    return (f"deepspeed={config}", "training.micro_batch=1", *more)


@pytest.fixture(scope="module")
def poisoned(workplace, poison, tmp_path_factory):
    """The run at stage 0, on one rank, with the poisoned base."""
    words = overrides(workplace, 0, tmp_path_factory.mktemp("zero"))
    return workplace.train("poisoned", 1, *words, llama="poisoned")


def test_poisoned_steps_are_skipped_counted_and_their_samples_named(poisoned, poison):
    assert [m["step"] for m in poisoned.metrics if m["skipped"]] == poison.steps
    assert all(m["loss"] is None for m in poisoned.metrics if m["skipped"])
    named = {id for m in poisoned.metrics if m["skipped"] for id in m["suspects"]}
    assert named == poison.ids  # micro-batches of one sample: exactly they
    assert json.loads((poisoned.folder / "summary.json").read_text())["skipped_steps"] == len(poison.steps)
    assert "skipped" in poisoned.log.read_text()
    assert all(torch.isfinite(value).all() for value in poisoned.adapters.values())


@pytest.mark.parametrize(
    ("stage", "split"),
    [(2, 2), (3, 1), *(pytest.param(stage, 1, marks=pytest.mark.slow) for stage in (0, 1, 2))],
)
def test_every_zero_stage_skips_alike_and_goes_on_alike(workplace, poison, poisoned, tmp_path, stage, split):
    words = overrides(workplace, stage, tmp_path, f"tensor_parallel={split}")
    run = workplace.train(f"poisoned-{stage}-{split}", 2, *words, llama="poisoned")
    assert [m["skipped"] for m in run.metrics] == [m["skipped"] for m in poisoned.metrics]
    healthy = [not m["skipped"] for m in run.metrics]
    torch.testing.assert_close(run.losses[healthy], poisoned.losses[healthy], rtol=1e-5, atol=0)


def test_a_run_resumed_behind_a_skipped_step_ends_bit_identical(workplace, poison, tmp_path):
    # AdamW corrects its bias by the updates made, not by the steps seen.
    words = overrides(workplace, 0, tmp_path, f"training.checkpoint_every={poison.steps[0]}")
    whole = workplace.train("whole", 1, *words, llama="poisoned")
    folder = whole.folder.with_name("resumed-behind-skip")
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    assert list_steps(folder / "checkpoints")[-1] < 20
    resumed = workplace.train(folder.name, 1, *words, llama="poisoned", resume="auto")
    assert all(torch.equal(resumed.adapters[name], value) for name, value in whole.adapters.items())


def test_too_many_skipped_steps_in_a_row_end_the_run_before_they_cost_more(workplace, poison, tmp_path):
    words = overrides(workplace, 2, tmp_path, "training.max_skipped_in_a_row=1")
    run = workplace.train("diverged", 2, *words, llama="poisoned", code=3)
    assert run.metrics[-1]["step"] == poison.steps[0]
    assert list_steps(run.folder / "checkpoints") == [7]
    suspects = json.loads((run.folder / "suspects.json").read_text())
    assert list(suspects) == [str(poison.steps[0])] and set(suspects[str(poison.steps[0])]) <= poison.ids
    printed = run.log.read_text()
    assert "suspects.json" in printed and "step 7" in printed and "Traceback" not in printed


def test_an_infinite_gradient_alone_is_skipped_too(workplace, tmp_path):
    # With such output weights the losses are 1e30 and the gradients' squares do not fit fp32.
    shutil.copytree(workplace.folder / "llama", workplace.folder / "steep")
    file = workplace.folder / "steep" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] *= 1e30 / state["lm_head.weight"].abs().max()
    save_file(state, file, metadata={"format": "pt"})
    words = overrides(workplace, 2, tmp_path, "training.max_skipped_in_a_row=2")
    run = workplace.train("steep", 2, *words, llama="steep", code=3)
    assert [m["skipped"] for m in run.metrics] == [True, True]
    assert np.isfinite([m["loss"] for m in run.metrics]).all()
    assert all(len(m["suspects"]) == 8 for m in run.metrics)  # the loss does not tell which: all of the step
