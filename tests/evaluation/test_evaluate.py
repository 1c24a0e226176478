"""`lavin-ds eval scienceqa` on real files, with bases whose every answer is known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lavin_ds.cli.main import app
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError
from lavin_ds.evaluation import job as jobs
from lavin_ds.evaluation.answer import answer
from lavin_ds.evaluation.requests import Generation
from lavin_ds.evaluation.tasks.scienceqa import ScienceQA, guess
from lavin_ds.generation.request import GREEDY, Sampling


@pytest.fixture(scope="module")
def base(pipeline):
    return pipeline.base("The answer is B.")


@pytest.fixture(scope="module")
def run(pipeline, base):
    return pipeline.run(base)


def report_of(**arguments) -> dict:
    job = jobs.prepare(jobs.EvalArguments(**arguments))
    return jobs.run(job, jobs.load(job))


def bare(pipeline, llama, out, **more) -> dict:
    """The report of a base without adapters."""
    return report_of(recipe=str(pipeline.recipe), llama=llama, data=pipeline.data, out=out / "results.json", **more)


def command(*words) -> object:
    return CliRunner().invoke(app, ["eval", "scienceqa", *map(str, words)])


def test_a_run_is_scored_from_its_folder_alone(pipeline, run):
    report = report_of(run=run)
    rows = [ShardReader(pipeline.data, "test").row(i) for i in range(report["questions"])]
    assert [p["id"] for p in report["predictions"]] == [row.id for row in rows]
    assert {(p["response"], p["predicted"]) for p in report["predictions"]} == {("The answer is B.", 1)}
    expected = 100 * sum(row.answer == 1 for row in rows) / len(rows)
    assert report["table"]["Avg"]["accuracy"] == pytest.approx(expected)
    images = [row for row in rows if row.has_image]
    expected = 100 * sum(row.answer == 1 for row in images) / len(images)
    assert report["table"]["IMG"] == {
        "accuracy": pytest.approx(expected),
        "chance": pytest.approx(100 * sum(1 / row.n_choices for row in images) / len(images)),
        "count": len(images),
    }
    assert report["outcomes"] == {"answered": len(rows), "unparsed": 0, "cut": 0, "no_room": 0}
    assert json.loads((run / "eval-scienceqa-test.json").read_text()) == report


def test_a_bare_base_reads_every_question_as_text(pipeline, base, tmp_path):
    report = bare(pipeline, base, tmp_path)
    assert report["outcomes"]["answered"] == report["questions"]
    assert report["table"]["IMG"]["count"] > 0
    assert report["model"]["adapter"] is None


def test_an_exported_adapter_brings_its_recipe(pipeline, base, run, tmp_path):
    files = {"llama": base, "clip": pipeline.clip, "data": pipeline.data, "adapter": run / "adapter.safetensors"}
    report = report_of(**files, out=tmp_path / "results.json")
    assert report["table"] == report_of(run=run)["table"]
    assert report["model"]["recipe"] == pipeline.seeing_config.name


def test_what_is_no_answer_is_wrong_and_counted(pipeline, base, tmp_path):
    cut = bare(pipeline, base, tmp_path, generation=Generation(3))
    assert cut["outcomes"]["cut"] == cut["questions"]
    assert cut["table"]["Avg"]["accuracy"] == 0
    assert cut["predictions"][0]["response"] == "The answer is"
    for response in ("The answer is", "The answer is X."):
        report = bare(pipeline, pipeline.base(response), tmp_path)
        assert report["outcomes"]["unparsed"] == report["questions"], response
        assert {p["predicted"] for p in report["predictions"]} == {None}


def test_a_response_that_goes_on_is_still_read(pipeline, tmp_path):
    endless = bare(pipeline, pipeline.base("The answer is B.", ends=False), tmp_path, generation=Generation(8))
    assert endless["outcomes"]["answered"] == endless["questions"]


def test_a_prompt_without_room_is_reported(pipeline, base):
    job = job_of(pipeline, base)
    lengths = ShardReader(pipeline.data, "test").prompt_lengths(0)
    asked = replace(job.asked, max_length=int(lengths.max()) + 1)  # as if prepared for no more
    result = job.task.score(answer(jobs.load(job), asked, batch_size=5))
    full = [p for p, length in zip(result.predictions, lengths, strict=True) if length == lengths.max()]
    assert result.outcomes["no_room"] == len(full) > 0
    assert {(p.outcome, p.predicted, p.response) for p in full} == {("no_room", None, "")}
    assert result.outcomes["answered"] > 0


def job_of(pipeline, llama) -> jobs.Job:
    return jobs.prepare(
        jobs.EvalArguments(recipe=str(pipeline.recipe), llama=llama, data=pipeline.data, out=pipeline.folder / "o")
    )


def test_results_do_not_depend_on_batches_and_progress_adds_up(pipeline, run):
    job = jobs.prepare(jobs.EvalArguments(run=run))
    model = jobs.load(job)
    with torch.no_grad():  # a model that says something of its own to every prompt
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.shape) ** -0.5)

    def outcome(batch_size, sampling, limit=None):
        seen = []
        task = ScienceQA(pipeline.data, "test", limit)
        asked = task.ask(job.subject, Generation(6, sampling))
        answers = answer(model, asked, batch_size, lambda done, total: seen.append((done, total)))
        assert seen[-1] == (len(asked.requests),) * 2
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        return task.score(answers).predictions

    for sampling in (GREEDY, Sampling(temperature=1.0)):
        together = outcome(batch_size=64, sampling=sampling)
        assert len({p.response for p in together}) > 5
        assert outcome(batch_size=1, sampling=sampling) == outcome(batch_size=5, sampling=sampling) == together
        assert outcome(batch_size=5, sampling=sampling, limit=7) == together[:7]


def test_the_official_reading_guesses_reproducibly(pipeline):
    job = job_of(pipeline, pipeline.base("The answer is"))
    result = job.task.score(answer(jobs.load(job), job.asked), official=True)
    rows = [ShardReader(pipeline.data, "test").row(i) for i in range(job.task.rows)]
    assert [p.predicted for p in result.predictions] == [guess(row.n_choices, 0, row.id) for row in rows]
    assert result.outcomes["unparsed"] == len(rows)


def test_the_table_and_what_it_does_not_say(pipeline, run):
    result = command("--run", run, "--max-new-tokens", 3, "--limit", 20, "--sample")
    assert result.exit_code == 0, result.output
    names = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert any(line.split() == names for line in result.stdout.splitlines())  # whole, though 80 columns wide
    assert "chance %" in result.stdout
    assert "Only the first 20 of 42" in result.stdout
    assert "counted as wrong: 20 of 20" in result.stdout
    assert "--max-new-tokens 3" in result.stdout
    assert "temperature 0.1" in result.stdout
    assert (run / "eval-scienceqa-test-first-20-sampled-0.json").is_file()


def test_json_alone_is_on_stdout(pipeline, base, tmp_path):
    out = tmp_path / "results.json"
    words = ["--recipe", pipeline.recipe, "--llama", base, "--data", pipeline.data, "--out", out, "--json"]
    result = command(*words)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    written = json.loads(out.read_text())
    assert summary.pop("out") == str(out)
    assert summary == {key: value for key, value in written.items() if key != "predictions"}
    assert list(summary["table"]) == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": None}, "Give --run RUN; or --data with the questions"),
        ({"recipe": "lavin-7b"}, "--run has its own recipe"),
        ({"split": "val"}, "has no split 'val': it has test"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
        ({"out": "no/such/folder/x.json"}, "no/such/folder/x.json is in a folder that does not exist"),
        ({"out": "."}, "--out . is a folder"),
        ({"data": "nowhere"}, "nowhere/manifest.json"),
    ],
)
def test_wrong_arguments_are_told_before_weights_load(run, change, message):
    paths = {key: Path(value) if value and key in ("run", "out", "data") else value for key, value in change.items()}
    arguments = replace(jobs.EvalArguments(run=run), **paths)
    with pytest.raises(UserError) as error:
        jobs.prepare(arguments)
    assert message in str(error.value)


def test_a_recipe_that_learns_needs_its_adapter(pipeline, base, run):
    files = {"llama": base, "clip": pipeline.clip, "data": pipeline.data}
    with pytest.raises(UserError, match="--adapter FILE"):
        jobs.prepare(jobs.EvalArguments(recipe=str(pipeline.seeing_recipe), **files))
    with pytest.raises(UserError, match="leave --adapter out"):
        adapter = run / "adapter.safetensors"
        jobs.prepare(jobs.EvalArguments(recipe=str(pipeline.recipe), adapter=adapter, llama=base, data=pipeline.data))
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        jobs.prepare(jobs.EvalArguments(adapter=run / "nowhere.safetensors", **files))


def test_shards_of_other_settings_are_refused(pipeline, base):
    with pytest.raises(UserError, match=r"data\.max_length: shards 400, recipe 300"):
        jobs.prepare(
            jobs.EvalArguments(
                recipe=str(pipeline.recipe), overrides=("data.max_length=300",), llama=base, data=pipeline.data
            )
        )
