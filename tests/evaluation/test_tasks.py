"""A benchmark is one file and one line in TASKS: a toy one, that the package does not know, is scored by its name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lavin_ds.cli.main import app
from lavin_ds.data.layout import Frame
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError
from lavin_ds.evaluation.requests import Answer, Generation, Request, RequestSet
from lavin_ds.evaluation.tasks import TASKS, find_task
from lavin_ds.evaluation.tasks.task import Accuracy, Prediction, Result, Task
from lavin_ds.generation.subject import Subject


class Toy(Task):
    """Lines of a question, its choices and the right one's number; the likelier choice is the answer."""

    name = "toy"

    def __init__(self, data: Path, split: str, limit: int | None):
        self.data = data
        self.items = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        self.rows = len(self.items)
        self.items = self.items[:limit]
        self.questions = len(self.items)

    def ask(self, subject: Subject, generation: Generation) -> RequestSet:
        tokenizer = Tokenizer(subject.llama / "tokenizer.model")
        return RequestSet(
            [
                Request(
                    item["id"],
                    tokenizer.encode(f"{item['question']}\nResponse:"),
                    continuations=tokenizer.encode_continuation_batch([f" {choice}" for choice in item["choices"]]),
                )
                for item in self.items
            ],
            tokenizer,
            Frame.of(tokenizer),
            subject.config.data.max_length,
            image=lambda index: None,
        )

    def score(self, answers: Mapping[str, Answer], official: bool = False, seed: int = 0) -> Result:
        predictions = []
        for item in self.items:
            values = answers[item["id"]].log_likelihoods
            index = values.index(max(values)) if values else None
            outcome = Prediction.outcome_of(answers[item["id"]], index is not None)
            predictions.append(Prediction(item["id"], item["answer"], index, outcome, ""))
        right = sum(p.predicted == p.answer for p in predictions)
        return Result(predictions, {"All": Accuracy(100 * right / len(predictions), 50.0, len(predictions))})


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registered, with three questions of which a base that says "The answer is B." gets two right."""
    monkeypatch.setitem(TASKS, Toy.name, f"{Toy.__module__}:Toy")
    items = [
        {"id": f"t{i}", "question": "Question: ?", "choices": choices, "answer": 1}
        for i, choices in enumerate(
            [["The answer is A.", "The answer is B."], ["C", "The answer"], ["The answer is B.", "A"]]
        )
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, items)))
    return tmp_path


def test_a_toy_task_is_scored_by_its_name(pipeline, toy):
    words = ["--recipe", pipeline.recipe, "--llama", pipeline.base("The answer is B."), "--data", toy]
    result = CliRunner().invoke(app, ["eval", "toy", *map(str, words), "--out", str(toy / "out.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((toy / "out.json").read_text())
    assert report["task"] == "toy"
    assert report["table"] == {"All": {"accuracy": pytest.approx(200 / 3), "chance": 50.0, "count": 3}}
    assert [p["predicted"] for p in report["predictions"]] == [1, 1, 0]
    assert ["accuracy", "%", "66.67"] in [line.split() for line in result.stdout.splitlines()]


def test_answers_are_matched_by_id_and_need_no_model(toy):
    likelier = {"t0": (-2.0, -1.0), "t1": (-1.0, -2.0), "t2": (-2.0, -1.0)}
    answers = {id: Answer(id, log_likelihoods=likelier[id]) for id in ("t2", "t0", "t1")}
    result = Toy(toy, "test", None).score(answers)
    assert [(p.id, p.predicted) for p in result.predictions] == [("t0", 1), ("t1", 0), ("t2", 1)]


def test_every_task_is_found_by_its_name():
    assert TASKS and all(find_task(name).name == name for name in TASKS)


def test_an_unknown_task_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match="no evaluation task 'scienceq': choose one of scienceqa"):
        find_task("scienceq")
