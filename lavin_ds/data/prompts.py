"""The text of a record: the prompt that the model reads, and the response that it learns.

A recipe's `data.prompt_format` names the wording. data_prep/sources.py knows the formats of each kind of data.

ScienceQA: a format such as `QCM-ALE` lists the parts of the prompt before the dash and those of the response after it:
Q question, C context, M choices, A answer, L lecture, E explanation (which the data set calls the solution).

The authors' code words some parts differently, and `compat` chooses their wording. The differences:

| point                      | here                                  | compat (reference, section 2)         |
|----------------------------|---------------------------------------|---------------------------------------|
| AL and AE                  | AL gives the lecture, AE the solution | swapped                               |
| no lecture and no solution | "BECAUSE:" is left out                | "BECAUSE:" with nothing after it      |
| line breaks                | kept as they are, one token each      | a backslash and an "n" in lecture and |
|                            |                                       | solution, kept in question and hint   |
| spaces                     | each run becomes one space            | each pair becomes one space, once     |
| response                   | starts with the space that follows    | no space: "Response:The answer is B." |
|                            | "Response:"                           |                                       |

Line breaks are kept because they have a meaning (tables in hints, lists and paragraphs in lectures), and because the
frozen LLM was not trained on texts with a backslash and an "n" in their place.

Instructions: `single-turn` makes a sample of every turn of a conversation, each with the image, as the authors
train (reference, section 2); `conversation` makes one sample of all turns. The wording of a turn is the authors'.

`caption`: no paper states a prompt for captioning. The instruction is one of LLaVA's for brief descriptions ("Visual
Instruction Tuning", appendix), worded as the authors word instructions.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Protocol

LETTERS = string.ascii_uppercase

INPUT_PARTS = {  # the order of the prompt's lines; L, E and LE are one BECAUSE line
    "QCM": ("Q", "C", "M"),
    "CQM": ("C", "Q", "M"),
    "QCML": ("Q", "C", "M", "L"),
    "QCME": ("Q", "C", "M", "E"),
    "QCMLE": ("Q", "C", "M", "LE"),
    "QCLM": ("Q", "C", "L", "M"),
    "QCEM": ("Q", "C", "E", "M"),
    "QCLEM": ("Q", "C", "LE", "M"),
}
OUTPUTS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA")
SCIENCEQA_FORMATS = tuple(f"{i}-{o}" for i in INPUT_PARTS for o in OUTPUTS)
SINGLE_TURN, CONVERSATION, CAPTION = "single-turn", "conversation", "caption"
CAPTION_INSTRUCTION = "Provide a brief description of the given image."


class Turn(Protocol):
    """One prompt and its response, as text.

    `context` is the part of the prompt that may be shortened. The response starts with the space that follows
    "Response:", except with compat.
    """

    @property
    def context(self) -> str: ...

    @property
    def response(self) -> str: ...

    def prompt(self, context: str) -> str: ...


@dataclass(frozen=True)
class Question:
    """The text of one record. `answer` is an index into `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    lecture: str = ""
    solution: str = ""

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True)
class QuestionTurn:
    """A ScienceQA question in one of SCIENCEQA_FORMATS (a `Turn`)."""

    question: Question
    caption: str | None
    format: str
    compat: bool = False

    @property
    def context(self) -> str:
        return context_of(self.question, self.caption, self.compat)

    @property
    def response(self) -> str:
        return build_response(self.question, self.format, self.compat)

    def prompt(self, context: str) -> str:
        return build_prompt(self.question, self.format, context, self.compat)


@dataclass(frozen=True)
class Instruction:
    """An instruction, its input as in Alpaca (may be empty), and the reply (a `Turn`)."""

    instruction: str
    input: str
    reply: str
    compat: bool = False

    @property
    def context(self) -> str:
        return _tidy(self.input) if not self.compat else self.input

    @property
    def response(self) -> str:
        return _squeeze_once(self.reply) if self.compat else " " + _tidy(self.reply)

    def prompt(self, context: str) -> str:
        if self.compat:
            return _squeeze_once(f"Instruction: {self.instruction} {context}\nResponse:")
        return f"Instruction: {_tidy(self.instruction)} {context}".rstrip() + "\nResponse:"


def context_of(question: Question, caption: str | None, compat: bool = False) -> str:
    """The hint followed by the caption. Either may be missing."""
    clean = str.strip if compat else _tidy
    hint, caption = clean(question.hint), clean(caption or "")
    return f"{hint} {caption}".strip()


def build_prompt(question: Question, format: str, context: str, compat: bool = False) -> str:
    """The prompt, from "Question:" to "Response:". An empty context reads "N/A".

    The context is an argument (see `context_of`), so that it can be shortened if a sample is too long.
    """
    parts = INPUT_PARTS[format.split("-")[0]]
    clean = _tidy if not compat else lambda text: text
    choices = [f"({k}) {clean(c)}" for k, c in zip(LETTERS, question.choices, strict=False)]
    lines = {
        "Q": f"Question: {clean(question.question)}",
        "C": f"Context: {context or 'N/A'}",
        "M": f"Options: {' '.join(choices)}",
    }
    for letters in {"L", "E", "LE"}.intersection(parts):
        reason = _explanation(question, letters, compat)
        if reason.strip() or compat:  # the authors' code keeps an empty line
            lines[letters] = f"BECAUSE: {reason}"
    prompt = "\n".join([*(lines[part] for part in parts if part in lines), "Response:"])
    return _squeeze_once(prompt) if compat else prompt


def build_response(question: Question, format: str, compat: bool = False) -> str:
    """The response, with a leading space unless `compat`: prompt + response is the whole text."""
    output = format.split("-")[1]
    answer = f"The answer is {question.letter}."
    letters = output.replace("A", "")
    if compat and output in ("AL", "AE"):
        letters = {"L": "E", "E": "L"}[letters]  # the names are swapped in the authors' code
    reason = _explanation(question, letters, compat)
    if not letters:
        response = answer
    elif output.startswith("A"):
        response = f"{answer} BECAUSE: {reason}" if reason or compat else answer
    else:
        response = f"{reason} {answer}"
    return _squeeze_once(response) if compat else " " + response.strip()


def _explanation(question: Question, letters: str, compat: bool) -> str:
    """Lecture (L) and solution (E) in the order of `letters`, joined by a space."""
    texts = {"L": question.lecture, "E": question.solution}
    if compat:
        return " ".join(texts[k].replace("\n", "\\n") for k in letters)
    return " ".join(filter(None, (_tidy(texts[k]) for k in letters)))


def _tidy(text: str) -> str:
    """Makes each run of blanks one space, and strips every line. Keeps at most one empty line in a row."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    text = "\n".join(" ".join(line.split()) for line in lines).strip()
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _squeeze_once(text: str) -> str:
    """Replaces each pair of spaces with one space, once, as the authors' code does: three spaces become two."""
    return text.replace("  ", " ").strip()
