"""Conversations between a person and a model, as turns. Shared by `instruct` and `own`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavin_ds.data.prompts import CONVERSATION, SINGLE_TURN, Instruction
from lavin_ds.data_prep.records import Refused, Text
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data.schema import PromptSettings

IMAGE_MARK = "<image>"  # where LLaVA puts the visual tokens; here they are always before the first prompt
TURN_FORMATS = (SINGLE_TURN, CONVERSATION)


def check_compat(prompt: PromptSettings) -> None:
    """Raises UserError for compat with whole conversations, because the authors train single turns only."""
    if prompt.compat and prompt.format == CONVERSATION:
        raise UserError(f"The authors train single turns: with compat, data.prompt_format must be {SINGLE_TURN}.")


def turns_of(key: str, said: Sequence[str], has_image: bool, compat: bool) -> tuple[Instruction, ...]:
    """Makes turns of texts that alternate between person and model; `key` names them in a refusal.

    Raises:
        Refused: a text has <image> but there is no image, or an instruction or a reply is empty.
    """
    if not has_image and any(IMAGE_MARK in text for text in said):
        raise Refused("image", f"is missing, but the conversation has {IMAGE_MARK}")
    turns = []
    for asked, reply in zip(said[::2], said[1::2], strict=True):
        instruction = asked.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "").strip()
        demand(key, instruction, "have an empty instruction")
        demand(key, reply, "have an empty reply: there is no answer to learn")
        turns.append(Instruction(instruction, "", reply, compat))
    return tuple(turns)


def texts_of(id: str, turns: tuple[Instruction, ...], format: str) -> tuple[Text, ...]:
    """One sample of all turns; or in format `single-turn` one sample per turn: ID, ID.1, ID.2 and so on."""
    if format == CONVERSATION:
        return (Text(id, turns),)
    return tuple(Text(f"{id}.{n}" if n else id, (turn,)) for n, turn in enumerate(turns))


def demand(key: str, text: str, reason: str) -> None:
    """Raises Refused with `reason` if a text is blank."""
    if not text.strip():
        raise Refused(key, reason)
