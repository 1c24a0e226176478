"""Instructions: Alpaca's and LLaVA's files, mixed in one split `train` (paper 1, section 4.1: 52k + 158k).

    Alpaca   [{"instruction": .., "input": .., "output": ..}, ..]
    LLaVA    [{"image": path below IMAGES or absent, "conversations": [{"from": "human", "value": ..},
              {"from": "gpt", "value": ..}, ..]}, ..]

LLaVA's ids are not unique (a conversation, a description and a question about one COCO image share its id), and Alpaca
has none. So a row's id is the file's name and the record's number in it, followed by the turn's number if a
conversation was cut into single turns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lavin_ds.data.prompts import Instruction
from lavin_ds.data_prep.conversations import TURN_FORMATS, check_compat, demand, texts_of, turns_of
from lavin_ds.data_prep.reading import OptionalText, RawRecord, Unicode, path_below, read_json
from lavin_ds.data_prep.records import Listed, Listing, Record, Refused, Source, Text, option
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data.schema import PromptSettings

LAYOUT = {
    "alpaca": "an Alpaca file is a list of records with instruction, input and output",
    "llava": "a LLaVA file is a list of records with conversations",
}


class RawAlpaca(RawRecord):
    instruction: Unicode
    output: Unicode
    input: OptionalText = ""


class RawTurn(RawRecord):
    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: Unicode


class RawLlava(RawRecord):
    conversations: list[RawTurn] = Field(min_length=2)
    image: OptionalText = ""


@dataclass(frozen=True)
class Instruct(Source):
    """Instructions of Alpaca and LLaVA in one set; data.prompt_format is single-turn or conversation."""

    # A raw record is its file's kind and its JSON.
    kind = "instruct"
    formats = TURN_FORMATS
    recipe = "chatbot-13b"

    alpaca: tuple[Path, ...] = option("Alpaca JSON; may be given several times.", ())
    llava: tuple[Path, ...] = option("LLaVA conversation JSON; may be given several times.", ())
    images: Path | None = option("Folder that the image paths of LLaVA's files start from.", None)

    @property
    def files(self) -> list[tuple[Literal["alpaca", "llava"], Path]]:
        return [("alpaca", path) for path in self.alpaca] + [("llava", path) for path in self.llava]

    @property
    def where(self) -> str:
        return ", ".join(str(path) for _, path in self.files)

    @property
    def root(self) -> Path:
        return self.images or self.files[0][1].parent

    def listing(self, prompt: PromptSettings) -> Listing:
        check_compat(prompt)
        if not self.files:
            raise UserError("There is nothing to prepare: give files with --alpaca and --llava.")
        [(stem, count)] = Counter(path.stem for _, path in self.files).most_common(1)
        if count > 1:
            raise UserError(f"{count} files are named {stem}, so their rows would have the same ids: rename one.")
        if self.images and not self.images.is_dir():
            raise UserError(
                f"--images {self.images} is not a folder: give the one that the paths in LLaVA's files start from."
            )
        listed, sha256 = [], {}
        for kind, path in self.files:
            records, sha256[path.name] = read_json(path, list, LAYOUT[kind])
            if not records:
                raise UserError(f"{path} is empty: leave it out.")
            listed += [Listed(f"{path.stem}-{number}", (kind, raw)) for number, raw in enumerate(records)]
        return Listing({"train": listed}, sha256)

    def read(self, listed: Listed, prompt: PromptSettings) -> Record:
        kind, raw = listed.raw
        reader = self._read_alpaca if kind == "alpaca" else self._read_llava
        return reader(listed.id, raw, prompt)

    def _read_alpaca(self, id: str, raw, prompt: PromptSettings) -> Record:
        record = RawAlpaca.check(raw)
        demand("instruction", record.instruction, "is empty")
        demand("output", record.output, "is empty: there is no answer to learn")
        turn = Instruction(record.instruction, record.input, record.output, prompt.compat is not None)
        return Record((Text(id, (turn,)),))

    def _read_llava(self, id: str, raw, prompt: PromptSettings) -> Record:
        record = RawLlava.check(raw)
        image = ""
        if record.image:
            if not self.images:
                raise Refused("image", "is given, but --images is not")
            image = path_below("image", record.image)
        said = record.conversations
        if [turn.speaker for turn in said] != ["human", "gpt"] * (len(said) // 2):
            raise Refused("conversations", "do not alternate between human and gpt, from the first to the last")
        turns = turns_of("conversations", [turn.value for turn in said], bool(image), prompt.compat is not None)
        return Record(texts_of(id, turns, prompt.format), image)
