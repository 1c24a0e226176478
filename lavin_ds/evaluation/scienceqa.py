"""ScienceQA: from responses to the score table NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg of the papers.

Two ways to read an answer exist; a recipe's `compat` chooses the authors' one (reference.md, sections 8, 11):

| point          | here                       | compat                                                  |
|----------------|----------------------------|---------------------------------------------------------|
| where          | the response alone         | prompt and response                                     |
| which          | the last "The answer is X" | the first that any character follows                    |
| no such choice | wrong, and counted         | a random guess, and counted; theirs differs every time, |
|                |                            | here it follows from a seed and the sample's id         |

Accuracy and chance are percentages, as in the papers' tables.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lavin_ds.data.collate import prompt_batch
from lavin_ds.data.shards import Row, ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.evaluation.generate import Sampling, generate, generator_of, room
from lavin_ds.models.lavin import Lavin

LETTERS = string.ascii_uppercase
ANSWER = re.compile(r"The answer is ([A-Z])\b")
# The dot is not escaped there: "The answer is BC" is a B, and "The answer is B" at the end of the text fails.
OFFICIAL_ANSWER = re.compile(r"The answer is ([A-Z]).")

LOW_GRADES = {f"grade{n}" for n in range(1, 7)}
HIGH_GRADES = {f"grade{n}" for n in range(7, 13)}


@dataclass(frozen=True)
class Item:
    """What the score needs to know of a question. `answer` is an index below `n_choices`."""

    subject: str
    grade: str
    has_hint: bool
    has_image: bool
    answer: int
    n_choices: int

    @classmethod
    def of(cls, row: Row) -> Item:
        return cls(row.subject, row.grade, row.has_hint, row.has_image, row.answer, row.n_choices)


# A question with both a hint and an image counts in TXT and in IMG; one with neither, in NO.
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


@dataclass(frozen=True)
class Score:
    """One column. Percentages, or None where no question belongs to it."""

    accuracy: float | None
    chance: float | None  # what guessing among each question's choices is expected to reach
    count: int


def score(items: Sequence[Item], predicted: Sequence[int | None]) -> dict[str, Score]:
    """Scores every column; `predicted` holds a choice's index for each item, or None, which is wrong."""
    pairs = list(zip(items, predicted, strict=True))
    return {name: _score_column([pair for pair in pairs if belongs(pair[0])]) for name, belongs in COLUMNS.items()}


def _score_column(pairs: list[tuple[Item, int | None]]) -> Score:
    if not pairs:
        return Score(None, None, 0)
    correct = sum(item.answer == index for item, index in pairs)
    chance = sum(1 / item.n_choices for item, _ in pairs)
    return Score(100 * correct / len(pairs), 100 * chance / len(pairs), len(pairs))


def read_answer(response: str, n_choices: int) -> int | None:
    """Index of the choice named by the last "The answer is X" of a response; None if it names none."""
    letters = ANSWER.findall(response)
    return _index(letters[-1], n_choices) if letters else None


def read_answer_official(text: str, n_choices: int) -> int | None:
    """The same as the authors read it: the first match in `text`, which is prompt and response."""
    match = OFFICIAL_ANSWER.search(text)
    return _index(match[1], n_choices) if match else None


def _index(letter: str, n_choices: int) -> int | None:
    index = LETTERS.index(letter)
    return index if index < n_choices else None


def guess(n_choices: int, seed: int, sample_id: str) -> int:
    """compat: the choice that stands in for an answer that could not be read."""
    return int(generator_of(seed, "guess", sample_id).integers(n_choices))


# What became of a question:
#   answered  one of its choices was read in the response
#   unparsed  the response ended without naming one
#   cut       the response was cut off before it named one: more max_new_tokens may help
#   no_room   the prompt fills max_length, so there is no response
Outcome = Literal["answered", "unparsed", "cut", "no_room"]


@dataclass(frozen=True)
class Prediction:
    """`predicted` is a choice's index. Unless `answered` it is None, or in compat a guess."""

    id: str
    answer: int
    predicted: int | None
    outcome: Outcome
    response: str


@dataclass(frozen=True)
class Result:
    """Predictions in the order of the split, and their scores."""

    predictions: list[Prediction]
    table: dict[str, Score]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many questions had each outcome."""
        counts = Counter(prediction.outcome for prediction in self.predictions)
        return {outcome: counts[outcome] for outcome in get_args(Outcome)}


def evaluate(
    model: Lavin,
    reader: ShardReader,
    tokenizer: Tokenizer,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    limit: int | None = None,
    official_reading: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Answers the questions of a split, or its first `limit`, and scores them.

    A model without vision reads every sample as text. Prompt and response together keep to the positions that
    the shards were prepared for (data.max_length). The authors generate 64 tokens: enough where the answer
    comes first; formats that end with it (LEA and the like) need more, and `outcomes["cut"]` tells.

    official_reading: answers are read as the authors do, see above.
    on_progress: called after every batch with the number of questions done and of all.
    """
    visual_tokens = model.config.visual_tokens
    max_length = reader.manifest.prompt.max_length
    device = next(model.parameters()).device
    visual_input = reader.visual_input(model.config.vision_source)
    rows = [reader.row(index) for index in range(min(len(reader), limit or len(reader)))]
    lengths = reader.prompt_lengths(visual_tokens).tolist()[: len(rows)]
    rooms = [room(length, max_new_tokens, max_length) for length in lengths]

    responses: dict[int, list[int]] = {}
    done = 0
    for indices in batches_by_length(lengths, batch_size):
        fitting = [i for i in indices if rooms[i] >= 1]  # the others are reported as no_room
        if fitting:
            batch = prompt_batch([rows[i] for i in fitting], visual_input, reader.frame, visual_tokens)
            ids = generate(model, batch.to(device), max_new_tokens, tokenizer.eos_id, sampling, max_length)
            responses.update(zip(fitting, ids, strict=True))
        done += len(indices)
        if on_progress:
            on_progress(done, len(rows))

    seed = sampling.seed if sampling else 0
    predictions = [
        _predict(row, responses.get(i), rooms[i], tokenizer, official_reading, seed) for i, row in enumerate(rows)
    ]
    return Result(predictions, score([Item.of(row) for row in rows], [p.predicted for p in predictions]))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that there is little padding.

    The longest come first: where memory is short, it is so in the first batch and not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _predict(
    row: Row, response_ids: list[int] | None, longest: int, tokenizer: Tokenizer, official_reading: bool, seed: int
) -> Prediction:
    """Reads one response, which is None if there was no room for any. One of the `longest` length was cut off."""
    response = _text(tokenizer, response_ids or [])
    if official_reading:
        whole_text = _text(tokenizer, [*row.prompt_ids, *(response_ids or [])])
        index = read_answer_official(whole_text, row.n_choices)
    else:
        index = read_answer(response, row.n_choices)
    if response_ids is None:
        outcome = "no_room"
    elif index is not None:
        outcome = "answered"
    else:
        outcome = "cut" if len(response_ids) == longest else "unparsed"
    if index is None and official_reading:
        index = guess(row.n_choices, seed, row.id)
    return Prediction(row.id, row.answer, index, outcome, response)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids. A base's vocabulary may be padded beyond its tokenizer's: such ids have none."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size]).strip()
