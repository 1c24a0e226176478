"""The interface of an evaluation task: one benchmark, from its data to its table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lavin_ds.evaluation.requests import Answer, Generation, RequestSet
from lavin_ds.generation.subject import Subject

# The outcome of a question:
#   answered  an answer was read in the response, or continuations were scored
#   unparsed  the response ended without an answer that can be read
#   cut       the response was cut off before it held an answer: more max_new_tokens may help
#   no_room   the prompt fills max_length, so there is no response
Outcome = Literal["answered", "unparsed", "cut", "no_room"]


@dataclass(frozen=True)
class Prediction:
    """One question's entry in the results file. `answer` is the true one; `predicted` is the one read, or None.

    With the official rule, `predicted` may be a guess although the outcome is not "answered".
    """

    id: str
    answer: Any
    predicted: Any
    outcome: Outcome
    response: str

    @staticmethod
    def outcome_of(answer: Answer, could_be_read: bool) -> Outcome:
        if answer.ending == "no_room":
            return "no_room"
        if could_be_read:
            return "answered"
        return "cut" if answer.ending == "cut" else "unparsed"


@dataclass(frozen=True)
class Accuracy:
    """One column of an accuracy table. Percentages, or None where no question belongs to the column."""

    accuracy: float | None
    chance: float | None  # the expected accuracy of guessing among each question's choices
    count: int


@dataclass(frozen=True)
class Result:
    """Predictions in the order of the questions, and the table: the figures of each column, by its name."""

    predictions: list[Prediction]
    table: dict[str, Any]  # of dataclasses whose fields are Task.figures

    @property
    def outcomes(self) -> dict[str, int]:
        """How many questions had each outcome."""
        counts = Counter(prediction.outcome for prediction in self.predictions)
        return {outcome: counts[outcome] for outcome in get_args(Outcome)}


class Task(ABC):
    """One benchmark, opened on its data. A subclass is a file in this folder and a line in TASKS.

    It does not know the model before `ask`, so that answers from elsewhere can be scored too.

    Class attributes:
        name: as in `lavin-ds eval NAME`.
        figures: the rows of the printed table, as the name of a figure and its label. The first is the score.

    Attributes:
        rows: the number of questions in the split.
        questions: the number that is asked: the first `limit`, or all.
    """

    name: ClassVar[str]
    figures: ClassVar[dict[str, str]] = {"accuracy": "accuracy %", "chance": "chance %", "count": "questions"}

    rows: int
    questions: int

    @abstractmethod
    def __init__(self, data: Path, split: str, limit: int | None):
        """Opens the benchmark.

        Raises:
            UserError: `data` does not hold this benchmark, or is damaged.
        """

    @abstractmethod
    def ask(self, subject: Subject, generation: Generation) -> RequestSet:
        """The questions as requests to a model. A task that scores continuations ignores `generation`.

        Raises:
            UserError: the data does not fit the model.
        """

    @abstractmethod
    def score(self, answers: Mapping[str, Answer], official: bool = False, seed: int = 0) -> Result:
        """Reads and scores the answers, one to every question asked, by id.

        official: follow the authors' own script where it differs from the default.
        seed: for the random choices of the official rule.
        """

    def facts(self, subject: Subject) -> dict[str, Any]:
        """What the results file says about the data, besides its folder and split."""
        return {}
