"""ScienceQA in its official folder layout.

DATA/problems.json               {id: record}
DATA/pid_splits.json             {split: [id, ..]}
DATA/captions.json               {"captions": {id: text}}, read only if the recipe has data.captions
DATA/images/SPLIT/ID/image.png   SPLIT and the file's name as the record says
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from lavin_ds.data.prompts import LETTERS, SCIENCEQA_FORMATS, Question, QuestionTurn
from lavin_ds.data_prep.reading import (
    OptionalText,
    RawRecord,
    Unicode,
    comma_separated,
    is_plain_name,
    is_unicode,
    path_below,
    read_json,
)
from lavin_ds.data_prep.records import Listed, Listing, Record, Refused, Source, Text, option
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data.schema import PromptSettings

DEFAULT_SPLITS = ("train", "val", "test")  # the set also has trainval, minitrain, minival and minitest
LAYOUT = "the official layout has problems.json, pid_splits.json, captions.json and images/"


class RawQuestion(RawRecord):
    question: Unicode
    choices: list[Unicode] = Field(min_length=2, max_length=len(LETTERS))
    answer: int = Field(ge=0)
    subject: Unicode
    grade: Unicode
    hint: OptionalText = ""
    lecture: OptionalText = ""
    solution: OptionalText = ""
    image: OptionalText = ""
    split: OptionalText = ""


@dataclass(frozen=True)
class ScienceQA(Source):
    """ScienceQA in its official folder layout."""

    # A raw record is its split, its JSON, and its caption or None.
    kind = "scienceqa"
    formats = SCIENCEQA_FORMATS
    recipe = "lavin-7b"

    data: Path = option("Folder with problems.json, pid_splits.json and images/.")
    splits: str = option("Comma-separated; default: those of train,val,test that exist.", "")

    @property
    def where(self) -> str:
        return str(self.data)

    @property
    def root(self) -> Path:
        return self.data

    def listing(self, prompt: PromptSettings) -> Listing:
        if self.data.is_file():
            raise UserError(f"--data {self.data} is a file: give the folder that holds it.")
        problems, problems_sha256 = read_json(self.data / "problems.json", dict, LAYOUT)
        ids, ids_sha256 = read_json(self.data / "pid_splits.json", dict, LAYOUT)
        sha256 = {"problems.json": problems_sha256, "pid_splits.json": ids_sha256}
        captions = {}
        if prompt.captions:
            captions, sha256["captions.json"] = self._captions()
        splits = {name: _listed(name, ids[name], problems, captions) for name in self._choose(ids)}
        return Listing(splits, sha256)

    def read(self, listed: Listed, prompt: PromptSettings) -> Record:
        split, raw, caption = listed.raw
        record = RawQuestion.check(raw)
        if record.answer >= len(record.choices):
            raise Refused("answer", f"is {record.answer}, beyond its {len(record.choices)} choices")
        texts = record.hint, record.lecture, record.solution
        question = Question(record.question, tuple(record.choices), record.answer, *texts)
        text = Text(
            id=listed.id,
            turns=(QuestionTurn(question, caption, prompt.format, prompt.compat is not None),),
            has_hint=bool(record.hint.strip()),
            answer=record.answer,
            n_choices=len(record.choices),
            subject=record.subject,
            grade=record.grade,
        )
        return Record((text,), _image_path(listed.id, record, split) if record.image else "")

    def _choose(self, ids: dict) -> list[str]:
        path = self.data / "pid_splits.json"
        chosen = list(comma_separated(self.splits) or [name for name in DEFAULT_SPLITS if name in ids])
        if not chosen:
            raise UserError(f"{path} has no train, val or test: name others with --splits.")
        for split in chosen:
            if split not in ids:
                raise UserError(f"{path} has no split '{split}': it has {', '.join(ids)}.")
            if not isinstance(ids[split], list) or not all(isinstance(pid, str) for pid in ids[split]):
                raise UserError(f"{path}: {split} must be a list of ids in quotes.")
            if not ids[split]:
                raise UserError(f"{path}: {split} is empty: leave it out with --splits.")
        return chosen

    def _captions(self) -> tuple[dict[str, str], str]:
        path = self.data / "captions.json"
        raw, sha256 = read_json(path, dict, LAYOUT)
        captions = raw.get("captions")
        if not isinstance(captions, dict):
            raise UserError(f"{path} must hold a mapping of ids under the key captions.")
        for pid, caption in captions.items():
            if not isinstance(caption, str) or not is_unicode(caption):
                raise UserError(f"{path}: the caption of {pid} is not text: correct it.")
        return captions, sha256


def _listed(split: str, ids: list[str], problems: dict, captions: dict[str, str]) -> list[Listed]:
    listed, seen = [], set()
    for pid in ids:
        fault = None
        if pid in seen:
            fault = Refused("id", f"appears twice in pid_splits.json under {split}")
        elif not is_plain_name(pid):
            fault = Refused("id", "is not a plain file name, so it could lead out of the image folder")
        elif pid not in problems:
            fault = Refused("id", "is not in problems.json")
        seen.add(pid)
        listed.append(Listed(pid, (split, problems.get(pid), captions.get(pid)), fault))
    return listed


def _image_path(pid: str, record: RawQuestion, split: str) -> str:
    folder = path_below("split", record.split or split)
    return path_below("image", "images", folder, pid, record.image)
