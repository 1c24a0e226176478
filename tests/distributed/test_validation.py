"""Validation while a run goes on: right, the same on any ranks, and without a trace in what is learnt."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from ranks import Spy
from safetensors.torch import load_file

from lavin_ds.config import load_recipe
from lavin_ds.data.collate import collate, prompt_batch
from lavin_ds.data.prompts import LETTERS
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.parallel import initialize_single_process
from lavin_ds.run import load_run
from lavin_ds.training import checkpoint
from lavin_ds.training.checkpoint import best_step, list_steps
from lavin_ds.training.validation import validation_rows
from lavin_ds.weights.adapter import save_adapter
from lavin_ds.weights.base import build_model

DROPOUT = ("model.llm_adapter.dropout=0.2", "model.vision_adapter.dropout=0.2")
EVERY = ("training.validate_every=6", "training.validation_samples=9")


@pytest.fixture(scope="module")
def validated(workplace):
    return workplace.train("validated", 2, *DROPOUT, *EVERY, "training.keep_checkpoints=1")


def scores(run) -> list[tuple[int, float, float]]:
    return [(m["step"], m["val_loss"], m["val_answer_accuracy"]) for m in run.metrics if "val_loss" in m]


def test_it_changes_nothing_of_the_training(workplace, validated):
    plain = workplace.train("plain", 2, *DROPOUT)
    assert [m["loss"] for m in plain.metrics] == [m["loss"] for m in validated.metrics]
    assert all(torch.equal(validated.adapters[name], value) for name, value in plain.adapters.items())
    assert [step for step, *_ in scores(validated)] == [6, 12, 18, 20]


def test_loss_and_accuracy_are_those_of_a_model_asked_one_sample_at_a_time(workplace, validated):
    """The loss by hand from the samples; the accuracy by decoding from the prompt, "The answer is" and no more."""
    initialize_single_process()
    config = load_recipe(str(workplace.recipe))
    inputs = workplace.arguments("validated")
    model = build_model(config, inputs.llama, inputs.clip, validated.folder / "adapter.safetensors")
    reader = ShardReader(inputs.data, "val")
    tokenizer = Tokenizer(inputs.data / "tokenizer.model")
    told = tokenizer.encode_continuation_batch([" The answer is A.", " The answer is B."])
    lead = next(i for i, (a, b) in enumerate(zip(*told, strict=True)) if a != b)
    letters = [ids[lead] for ids in tokenizer.encode_continuation_batch([f" The answer is {k}." for k in LETTERS[:5]])]
    losses, labels, right = {}, {}, {}
    with torch.no_grad():
        for index in range(len(reader)):
            row = reader.row(index)
            pictures = (reader.image, reader.frame, config.model.visual_tokens)
            loss_sum, labels[index] = model(collate([row], *pictures))
            losses[index] = float(loss_sum)
            start = int(row.label_spans[0][0])
            prompt = type(row)(**vars(row) | {"prompt_ids": row.token_ids[: start + lead]})
            logits_V = model.llm.logits(model.hidden(prompt_batch([prompt], *pictures))[0, -1])
            right[index] = int(logits_V[letters[: row.n_choices]].argmax()) == row.answer
    _, val_loss, accuracy = scores(validated)[-1]
    chosen = [int(i) for i in validation_rows(load_recipe(str(workplace.recipe), list(EVERY)), reader)]
    assert len(set(chosen)) == 9
    assert val_loss == pytest.approx(sum(losses[i] for i in chosen) / sum(labels[i] for i in chosen), rel=1e-5)
    assert accuracy == pytest.approx(sum(right[i] for i in chosen) / 9)
    assert 0 < accuracy < 1  # or the comparison would say little


@pytest.fixture(scope="module")
def alone(workplace, tmp_path_factory):
    config = tmp_path_factory.mktemp("monitored") / "zero1.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "csv_monitor": {"enabled": True}}))
    return workplace.train("validated-alone", 1, *EVERY, f"deepspeed={config}")


def test_a_monitor_that_the_deepspeed_file_enables_is_told_everything_by_step(alone):
    told = {path.stem: path.read_text().splitlines()[1:] for path in (alone.folder / "monitors").rglob("*.csv")}
    for name, key in (("train_loss", "loss"), ("train_gradient_norm", "gradient_norm")):
        values = [(int(step), float(value)) for step, value in (line.split(",") for line in told[name])]
        assert values == [(m["step"], m[key]) for m in alone.metrics]
    assert [int(line.split(",")[0]) for line in told["val_loss"]] == [step for step, *_ in scores(alone)]
    assert "train_learning_rate" in told and "val_answer_accuracy" in told


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ("tensor_parallel=2",)),
        pytest.param(1, ("training.packing=true",), marks=pytest.mark.slow),
        pytest.param(2, ("training.micro_batch=1", "deepspeed=zero3"), marks=pytest.mark.slow),
    ],
)
def test_it_is_the_same_on_other_ranks(workplace, alone, ranks, words):
    run = workplace.train(f"validated-{ranks}-{words[0]}", ranks, *EVERY, *words)
    for (step, loss, accuracy), wanted in zip(scores(run), scores(alone), strict=True):
        assert (step, accuracy) == (wanted[0], wanted[2])
        assert loss == pytest.approx(wanted[1], rel=2e-5)


def test_the_best_checkpoint_is_kept_and_its_adapters_are_exported(workplace, validated):
    folder = validated.folder / "checkpoints"
    step, loss, _ = min(scores(validated), key=lambda s: s[1])
    assert best_step(folder) == step
    assert set(list_steps(folder)) == {step, 20}
    state = load_file(folder / f"step-{step:08d}" / "state.safetensors")
    best = load_file(validated.folder / "adapter-best.safetensors")
    assert all(torch.equal(state[f"value/{name}"], value) for name, value in best.items())
    assert f"{loss:.4f}" in validated.log.read_text()


def test_a_stop_ends_a_validation_after_its_batch_and_the_resumed_run_validates_that_step_again(workplace, validated):
    words = (*DROPOUT, *EVERY, "training.keep_checkpoints=1")
    stopped = workplace.train("stopped-validating", 2, *words, code=143, spy=Spy(stops_in_validation=True))
    assert [m["step"] for m in stopped.metrics] == list(range(1, 7)) and not scores(stopped)
    assert list_steps(stopped.folder / "checkpoints") == [6]
    resumed = workplace.train("stopped-validating", 2, *words, resume="auto")
    assert scores(resumed) == scores(validated)
    assert [m["loss"] for m in resumed.metrics] == [m["loss"] for m in validated.metrics]
    assert all(torch.equal(resumed.adapters[name], value) for name, value in validated.adapters.items())
    best = [load_file(run.folder / "adapter-best.safetensors") for run in (validated, resumed)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    # Each start is recorded beside those before it.
    starts = load_run(resumed.folder).starts
    assert [start.step for start in starts] == [0, 6] and all(start.versions["torch"] for start in starts)


def test_a_run_can_start_from_an_exported_adapter(workplace, validated):
    adapter = validated.folder / "adapter.safetensors"
    words = ("training.peak_lr=1e-12", *EVERY)
    run = workplace.train("goes-on", 1, *words, init_adapter=adapter)
    # At such a rate nothing moves: it validates as the run it starts from ended.
    assert scores(run)[0][1] == pytest.approx(scores(validated)[-1][1], rel=1e-5)
    refused = workplace.train("refused", 1, "model.llm_adapter.dim=16", init_adapter=adapter, code=2)
    assert "model.llm_adapter.dim is 8 in the adapter and 16 in the recipe" in refused.log.read_text()
    assert not refused.folder.exists()
    # What only the model itself can tell is told when it is loaded: nothing was trained, so nothing stays behind.
    renamed = workplace.folder / "renamed.safetensors"
    tensors = load_file(adapter)
    save_adapter(
        renamed,
        {f"x.{name}": t for name, t in tensors.items()},
        load_run(validated.folder).config,
        workplace.folder / "llama",
    )
    refused = workplace.train("refused-later", 1, *EVERY, init_adapter=renamed, code=2)
    assert "has unexpected x." in refused.log.read_text() and not refused.folder.exists()


def test_a_best_checkpoint_that_is_damaged_is_named_and_the_next_best_is_exported(workplace, validated):
    run = validated.folder.with_name("best-damaged")
    shutil.copytree(validated.folder, run)
    best, last = (run / "checkpoints" / f"step-{step:08d}" for step in (6, 20))
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(last, best)
    at, sha256 = checkpoint._read_record(run / "checkpoints", 6)
    checkpoint._write_record(best, replace(at, val_loss=0.1), sha256)
    (best / "state.safetensors").write_bytes((last / "state.safetensors").read_bytes()[:-1])
    assert best_step(run / "checkpoints") == 6
    (run / "summary.json").unlink()
    resumed = workplace.train(run.name, 2, *DROPOUT, *EVERY, "training.keep_checkpoints=1", resume="auto")
    said = " ".join(resumed.log.read_text().split())
    assert "step-00000006, with the lowest validation loss, is damaged" in said
    wanted = checkpoint.load(run / "checkpoints", best_step(validated.folder / "checkpoints")).values()
    exported = load_file(run / "adapter-best.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in wanted.items())
    assert (run / "summary.json").exists()
