"""Instructions to a shard directory: Alpaca's and LLaVA's files, mixed in one set (paper 1, section 4.1: 52k + 158k).

    Alpaca   [{"instruction": .., "input": .., "output": ..}, ..]
    LLaVA    [{"image": path below IMAGES or absent, "conversations": [{"from": "human", "value": ..},
              {"from": "gpt", "value": ..}, ..]}, ..]

LLaVA's ids are not unique (the same COCO image stands under a conversation, a description and a question), and Alpaca
has none: a row's id is the file's name and the record's number in it, and of the later turns of a conversation that
was cut into single turns, the turn.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from lavin_ds.config import RunConfig
from lavin_ds.data.prompts import CONVERSATION, SINGLE_TURN, Instruction
from lavin_ds.data_prep.pipeline import PrepReport, prepare
from lavin_ds.data_prep.records import (
    Listed,
    Listing,
    OptionalText,
    RawRecord,
    Record,
    Refused,
    Text,
    Unicode,
    path_below,
    read_json,
)
from lavin_ds.errors import UserError

IMAGE_MARK = "<image>"  # where LLaVA puts its visual tokens; here they stand before the prompt
LAYOUT = {
    "alpaca": "an Alpaca file is a list of records with instruction, input and output",
    "llava": "a LLaVA file is a list of records with conversations",
}


def prepare_instruct(
    alpaca: list[Path], llava: list[Path], images: Path | None, tokenizer: Path, out: Path, config: RunConfig, **options
) -> PrepReport:
    """Prepares all files as the split `train`; `options` are those of `prepare`.

    `images`: the folder that LLaVA's paths start from; needed if its records have images.

    Raises:
        UserError: there is no file or one is malformed, the recipe is for other data, and all that `prepare` raises.
    """
    turns = config.data.prompt_format
    if turns not in (SINGLE_TURN, CONVERSATION):
        raise UserError(
            f"The recipe's data.prompt_format is {turns}, and that of instructions is {SINGLE_TURN} or {CONVERSATION}: "
            "give a recipe such as chatbot-13b."
        )
    compat = config.compat is not None
    if compat and turns == CONVERSATION:
        raise UserError(f"The authors train single turns: with compat, data.prompt_format must be {SINGLE_TURN}.")
    files = tuple([("alpaca", Path(path)) for path in alpaca] + [("llava", Path(path)) for path in llava])
    if not files:
        raise UserError("There is nothing to prepare: give files with --alpaca and --llava.")
    [(stem, count)] = Counter(path.stem for _, path in files).most_common(1)
    if count > 1:
        raise UserError(f"{count} files are named {stem}, and the ids of their rows would be the same: rename one.")
    if images and not images.is_dir():
        raise UserError(f"--images {images} is no folder: give the one that the paths in LLaVA's files start from.")
    return prepare(Instruct(files, images, turns, compat), tokenizer, out, config, **options)


class RawAlpaca(RawRecord):
    instruction: Unicode
    input: OptionalText = ""
    output: Unicode


class RawTurn(RawRecord):
    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: Unicode


class RawLlava(RawRecord):
    conversations: list[RawTurn] = Field(min_length=2)
    image: OptionalText = ""


@dataclass(frozen=True)
class Instruct:
    """A `Source` (see records.py). A raw record is its file's kind and its JSON."""

    files: tuple[tuple[Literal["alpaca", "llava"], Path], ...]
    images: Path | None
    turns: str
    compat: bool
    kind = "instruct"

    @property
    def where(self) -> str:
        return ", ".join(str(path) for _, path in self.files)

    @property
    def root(self) -> Path:
        return self.images or self.files[0][1].parent

    def listing(self) -> Listing:
        listed, sha256 = [], {}
        for kind, path in self.files:
            records, sha256[path.name] = read_json(path, list, LAYOUT[kind])
            if not records:
                raise UserError(f"{path} is empty: leave it out.")
            listed += [Listed(f"{path.stem}-{number}", (kind, raw)) for number, raw in enumerate(records)]
        return Listing({"train": listed}, sha256)

    def read(self, listed: Listed) -> Record:
        kind, raw = listed.raw
        return self._read_alpaca(listed.id, raw) if kind == "alpaca" else self._read_llava(listed.id, raw)

    def _read_alpaca(self, id: str, raw) -> Record:
        record = RawAlpaca.check(raw)
        _demand("instruction", record.instruction, "is empty")
        _demand("output", record.output, "is empty: there is no answer to learn")
        turn = Instruction(record.instruction, record.input, record.output, self.compat)
        return Record((Text(id, (turn,)),))

    def _read_llava(self, id: str, raw) -> Record:
        record = RawLlava.check(raw)
        image = ""
        if record.image:
            if not self.images:
                raise Refused("image", "is given, and --images is not")
            image = path_below("image", record.image)
        turns = self._turns(record)
        if self.turns == CONVERSATION:
            return Record((Text(id, turns),), image)
        texts = [Text(f"{id}.{n}" if n else id, (turn,)) for n, turn in enumerate(turns)]
        return Record(tuple(texts), image)

    def _turns(self, record: RawLlava) -> tuple[Instruction, ...]:
        said = record.conversations
        if [turn.speaker for turn in said] != ["human", "gpt"] * (len(said) // 2):
            raise Refused("conversations", "do not alternate between human and gpt, from the first to the last")
        marks = sum(turn.value.count(IMAGE_MARK) for turn in said)
        if marks and not record.image:
            raise Refused("image", f"is missing, and the conversation has {IMAGE_MARK}")
        turns = []
        for asked, reply in zip(said[::2], said[1::2], strict=True):
            instruction = asked.value.replace(IMAGE_MARK, "").strip()
            _demand("conversations", instruction, "have an empty instruction")
            _demand("conversations", reply.value, "have an empty reply: there is no answer to learn")
            turns.append(Instruction(instruction, "", reply.value, self.compat))
        return tuple(turns)


def _demand(key: str, text: str, otherwise: str) -> None:
    if not text.strip():
        raise Refused(key, otherwise)
