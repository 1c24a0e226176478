"""COCO captions with the Karpathy split.

    ANNOTATIONS   dataset_coco.json: {"images": [{"filepath", "filename", "split", "cocoid", "sentences": [{"raw"}]}]}
    IMAGES/FILEPATH/FILENAME

Karpathy's `restval` goes to train, as is usual. In train each caption is a row. In val and test each image is a row:
its label is the first caption, and the column `references` has all captions, for a score to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from lavin_ds.data.prompts import CAPTION, CAPTION_INSTRUCTION, Instruction
from lavin_ds.data_prep.reading import RawRecord, Unicode, comma_separated, path_below, read_json
from lavin_ds.data_prep.records import Listed, Listing, Record, Refused, Source, Text, option
from lavin_ds.errors import UserError

if TYPE_CHECKING:
    from lavin_ds.data.schema import PromptSettings

SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
LAYOUT = "dataset_coco.json has a list of images with filepath, filename, split, cocoid and sentences"


class RawSentence(RawRecord):
    raw: Unicode


class RawImage(RawRecord):
    filepath: Unicode
    filename: Unicode
    sentences: list[RawSentence] = Field(min_length=1)


@dataclass(frozen=True)
class Captions(Source):
    """COCO captions with the Karpathy split: one row per caption in train, one row per image in val and test."""

    # A raw record is its split and its JSON.
    kind = "captions"
    formats = (CAPTION,)
    recipe = "captions-13b"

    annotations: Path = option("Karpathy's dataset_coco.json.")
    images: Path = option("Folder with train2014/ and val2014/.")
    splits: str = option("Comma-separated; train includes restval.", "train,val,test")

    @property
    def where(self) -> str:
        return str(self.annotations)

    @property
    def root(self) -> Path:
        return self.images

    def listing(self, prompt: PromptSettings) -> Listing:
        if not self.images.is_dir():
            raise UserError(f"--images {self.images} is not a folder: give the one with train2014/ and val2014/.")
        raw, sha256 = read_json(self.annotations, dict, LAYOUT)
        records = raw.get("images")
        if not isinstance(records, list):
            raise UserError(f"{self.annotations} has no list under the key images: {LAYOUT}.")
        splits: dict[str, list[Listed]] = {name: [] for name in dict.fromkeys(SPLIT_OF.values())}
        seen = set()
        for number, record in enumerate(records):
            split, id = (record.get(key) if isinstance(record, dict) else None for key in ("split", "cocoid"))
            if not isinstance(split, str) or split not in SPLIT_OF or not isinstance(id, int):
                raise UserError(
                    f"{self.annotations}: image {number} of the list has no known split or cocoid: {LAYOUT}."
                )
            fault = Refused("cocoid", "appears twice") if id in seen else None
            seen.add(id)
            splits[SPLIT_OF[split]].append(Listed(str(id), (SPLIT_OF[split], record), fault))
        wanted = comma_separated(self.splits)
        for name in wanted:
            if not splits.get(name):
                known = ", ".join(name for name, listed in splits.items() if listed)
                raise UserError(f"{self.annotations} has no image of split '{name}': it has {known}.")
        return Listing({name: splits[name] for name in wanted}, {"annotations": sha256})

    def read(self, listed: Listed, prompt: PromptSettings) -> Record:
        split, raw = listed.raw
        record = RawImage.check(raw)
        captions = tuple(sentence.raw.strip() for sentence in record.sentences)
        if not all(captions):
            raise Refused("sentences", "have an empty caption")
        image = path_below("filename", record.filepath, record.filename)
        turns = [Instruction(CAPTION_INSTRUCTION, "", caption, prompt.compat is not None) for caption in captions]
        if split == "train":
            texts = [Text(f"{listed.id}.{n}", (turn,)) for n, turn in enumerate(turns)]
            return Record(tuple(texts), image)
        return Record((Text(listed.id, (turns[0],), references=captions),), image)
