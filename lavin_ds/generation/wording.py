"""Turns what a person types into a prompt like those that the adapter was trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lavin_ds.config import RunConfig
from lavin_ds.data.prompts import (
    CAPTION,
    CAPTION_INSTRUCTION,
    CONVERSATION,
    SCIENCEQA_FORMATS,
    Instruction,
    Question,
    QuestionTurn,
    Turn,
)
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.errors import UserError

CHOICES = re.compile(r"\(([A-Z])\)\s*")


@dataclass(frozen=True)
class Exchange:
    """An earlier turn of a conversation: what was asked and what the model said."""

    asked: str
    said: str


class Wording:
    """Makes prompts as recipe `config` has them in training (data.prompt_format).

    remembers: whether earlier turns are part of the prompt. That is so if the recipe trains on whole conversations.
        Adapters of other recipes have never seen a second turn, so each question is asked alone.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        self.format, self.compat, self.tokenizer = config.data.prompt_format, config.compat is not None, tokenizer
        self.remembers = self.format == CONVERSATION

    def explain(self) -> str:
        """One sentence for people: how a question is worded, and what the model remembers."""
        if self.format in SCIENCEQA_FORMATS:
            return "Trained on ScienceQA: ask a question with its choices, as in: Which is red? (A) the sky (B) a rose"
        if self.format == CAPTION:
            return "Trained to describe pictures: give it one. What you type is ignored."
        if self.remembers:
            return "Trained on conversations: earlier turns are part of each question."
        return "Trained on single instructions: each is asked alone, without earlier turns."

    def prompt_ids(
        self, text: str, history: Sequence[Exchange], room: int, for_answer: int = 1
    ) -> tuple[list[int], int]:
        """Ids of a prompt, and the number of earlier turns in it. These are the latest ones.

        room: the most tokens of prompt and answer together.
        for_answer: the tokens that earlier turns must leave for the answer; at most half of the room counts.

        Raises:
            UserError: the question leaves no room for an answer.
        """
        asked_ids = self._asked(text)
        if len(asked_ids) >= room:
            raise UserError(
                f"The question has {len(asked_ids)} tokens, but there is room for {room} with the answer: shorten it."
            )
        earlier: list[list[int]] = []
        for exchange in reversed(history if self.remembers else ()):
            (said_ids,) = self.tokenizer.encode_continuation_batch([" " + exchange.said])
            turn_ids = [*self._asked(exchange.asked), *said_ids, self.tokenizer.eos_id]
            if sum(map(len, earlier)) + len(turn_ids) + len(asked_ids) > room - min(for_answer, room // 2):
                break
            earlier.insert(0, turn_ids)
        return [id for turn_ids in earlier for id in turn_ids] + asked_ids, len(earlier)

    def _asked(self, text: str) -> list[int]:
        turn = self._turn(text)
        return self.tokenizer.encode(turn.prompt(turn.context))

    def _turn(self, text: str) -> Turn:
        if self.format in SCIENCEQA_FORMATS:
            return QuestionTurn(_question(text), None, self.format, self.compat)
        return Instruction(CAPTION_INSTRUCTION if self.format == CAPTION else text, "", "", self.compat)


def _question(text: str) -> Question:
    """Splits "Which is red? (A) the sky (B) a rose" into a question and its choices.

    A line that starts with "Context:" is the hint, as in the data set's prompts.
    """
    lines = text.strip().splitlines()
    hint = " ".join(line.removeprefix("Context:").strip() for line in lines if line.startswith("Context:"))
    body = "\n".join(line for line in lines if not line.startswith("Context:"))
    start = body.find("(A)")
    if start < 0:
        return Question(body.strip(), (), 0, hint)
    _, *parts = CHOICES.split(body[start:])
    return Question(body[:start].strip(), tuple(choice.strip() for choice in parts[1::2]), 0, hint)
