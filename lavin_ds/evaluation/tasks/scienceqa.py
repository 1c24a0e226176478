"""ScienceQA: asks the questions of prepared shards, and scores them in the papers' table (NAT SOC LAN TXT IMG ..).

There are two ways to read an answer; a recipe's `compat` chooses the authors' (reference.md, sections 8, 11):

| point          | here                       | official                                                |
|----------------|----------------------------|---------------------------------------------------------|
| text read      | the response alone         | prompt and response                                     |
| match          | the last "The answer is X" | the first one that is followed by any character         |
| no such choice | counts as wrong            | replaced by a random guess. The authors' guess differs  |
|                |                            | every time; here a seed and the sample's id decide it   |

Accuracy and chance are percentages, as in the papers' tables.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavin_ds.data.schema import check_manifest, manifest_sha256
from lavin_ds.data.shards import Row, ShardReader
from lavin_ds.errors import UserError
from lavin_ds.evaluation.requests import Answer, Generation, Request, RequestSet
from lavin_ds.evaluation.tasks.task import Accuracy, Prediction, Result, Task
from lavin_ds.generation.request import random_stream
from lavin_ds.generation.subject import Subject

LETTERS = string.ascii_uppercase
ANSWER = re.compile(r"The answer is ([A-Z])\b")
# As in the authors' code, the dot is not escaped: "The answer is BC" is read as B, and "The answer is B" at the end of
# the text is not found.
OFFICIAL_ANSWER = re.compile(r"The answer is ([A-Z]).")

LOW_GRADES = {f"grade{n}" for n in range(1, 7)}
HIGH_GRADES = {f"grade{n}" for n in range(7, 13)}


class ScienceQA(Task):
    """Asks the prompts in shards that `lavin-ds prep scienceqa` made.

    The authors generate 64 tokens, which is enough if the answer comes first. Formats that end with the answer, such as
    LEA, need more. Outcome "cut" counts the responses that were too short.
    """

    name = "scienceqa"

    def __init__(self, data: Path, split: str, limit: int | None):
        self.reader = ShardReader(data, split)
        self.rows = len(self.reader)
        self.questions = min(self.rows, limit or self.rows)
        manifest = self.reader.manifest
        if manifest.kind != "scienceqa":
            raise UserError(f"{data} holds {manifest.kind} data: this task needs shards of `lavin-ds prep scienceqa`.")
        self.tokenizer = self.reader.tokenizer

    def ask(self, subject: Subject, generation: Generation) -> RequestSet:
        reader, config = self.reader, subject.config
        disagreements = check_manifest(reader.manifest, config, subject.features_clip_sha256)
        if disagreements:
            raise UserError(f"{reader.directory} was not prepared for {config.name}: {'; '.join(disagreements)}.")
        return RequestSet(
            [Request(row.id, row.prompt_ids, row.image, generation) for row in self._asked()],
            self.tokenizer,
            reader.frame,
            reader.manifest.prompt.max_length,
            reader.visual_input(config.model.vision_source),
        )

    def score(self, answers: Mapping[str, Answer], official: bool = False, seed: int = 0) -> Result:
        rows = self._asked()
        predictions = [self._predict(row, answers[row.id], official, seed) for row in rows]
        return Result(predictions, score([Item.of(row) for row in rows], [p.predicted for p in predictions]))

    def facts(self, subject: Subject) -> dict:
        source = subject.config.model.vision_source
        return {"manifest_sha256": manifest_sha256(self.reader.directory, source)}

    def _asked(self) -> list[Row]:
        return [self.reader.row(index) for index in range(self.questions)]

    def _predict(self, row: Row, answer: Answer, official: bool, seed: int) -> Prediction:
        if official:
            prompt = self.tokenizer.decode(row.prompt_ids).strip()
            index = read_answer_official(f"{prompt} {answer.text}".strip(), row.n_choices)
        else:
            index = read_answer(answer.text, row.n_choices)
        outcome = Prediction.outcome_of(answer, index is not None)
        if index is None and official:
            index = guess(row.n_choices, seed, row.id)
        return Prediction(row.id, row.answer, index, outcome, answer.text)


@dataclass(frozen=True)
class Item:
    """The properties of a question that its score depends on. `answer` is an index below `n_choices`."""

    subject: str
    grade: str
    has_hint: bool
    has_image: bool
    answer: int
    n_choices: int

    @classmethod
    def of(cls, row: Row) -> Item:
        return cls(row.subject, row.grade, row.has_hint, row.has_image, row.answer, row.n_choices)


# A question with both a hint and an image counts in TXT and in IMG. A question with neither counts in NO.
COLUMNS: dict[str, Callable[[Item], bool]] = {
    "NAT": lambda item: item.subject == "natural science",
    "SOC": lambda item: item.subject == "social science",
    "LAN": lambda item: item.subject == "language science",
    "TXT": lambda item: item.has_hint,
    "IMG": lambda item: item.has_image,
    "NO": lambda item: not item.has_hint and not item.has_image,
    "G1-6": lambda item: item.grade in LOW_GRADES,
    "G7-12": lambda item: item.grade in HIGH_GRADES,
    "Avg": lambda item: True,
}


def score(items: Sequence[Item], predicted: Sequence[int | None]) -> dict[str, Accuracy]:
    """Scores every column. `predicted` holds the index of a choice for each item, or None, which counts as wrong."""
    pairs = list(zip(items, predicted, strict=True))
    return {name: _score_column([pair for pair in pairs if belongs(pair[0])]) for name, belongs in COLUMNS.items()}


def _score_column(pairs: list[tuple[Item, int | None]]) -> Accuracy:
    if not pairs:
        return Accuracy(None, None, 0)
    correct = sum(item.answer == index for item, index in pairs)
    chance = sum(1 / item.n_choices for item, _ in pairs)
    return Accuracy(100 * correct / len(pairs), 100 * chance / len(pairs), len(pairs))


def read_answer(response: str, n_choices: int) -> int | None:
    """Index of the choice named by the last "The answer is X" of a response; None if it names none."""
    letters = ANSWER.findall(response)
    return _index(letters[-1], n_choices) if letters else None


def read_answer_official(text: str, n_choices: int) -> int | None:
    """As `read_answer`, but by the authors' rule: the first match in `text`, which is prompt and response."""
    match = OFFICIAL_ANSWER.search(text)
    return _index(match[1], n_choices) if match else None


def _index(letter: str, n_choices: int) -> int | None:
    index = LETTERS.index(letter)
    return index if index < n_choices else None


def guess(n_choices: int, seed: int, sample_id: str) -> int:
    """official: a random choice in place of an answer that could not be read."""
    return int(random_stream(seed, f"guess {sample_id}").integers(n_choices))
