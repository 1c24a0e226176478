"""COCO captions with the Karpathy split, to a shard directory.

    ANNOTATIONS   dataset_coco.json: {"images": [{"filepath", "filename", "split", "cocoid", "sentences": [{"raw"}]}]}
    IMAGES/FILEPATH/FILENAME

Karpathy's `restval` goes to train, as is usual. In train every caption of an image is a row, to be learnt; in val and
test an image is one row, with all its captions in the column `references`, to be scored against; its label is the
first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from lavin_ds.config import RunConfig
from lavin_ds.data.prompts import CAPTION, CAPTION_INSTRUCTION, Instruction
from lavin_ds.data_prep.pipeline import PrepReport, prepare
from lavin_ds.data_prep.records import Listed, Listing, RawRecord, Record, Refused, Text, Unicode, path_below, read_json
from lavin_ds.errors import UserError

SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
LAYOUT = "dataset_coco.json has a list of images with filepath, filename, split, cocoid and sentences"


def prepare_captions(
    annotations: Path,
    images: Path,
    tokenizer: Path,
    out: Path,
    config: RunConfig,
    splits: list[str] | None = None,
    **options,
) -> PrepReport:
    """Prepares the splits, or train, val and test; `options` are those of `prepare`.

    Raises:
        UserError: a file is missing or malformed, the recipe is for other data, and all that `prepare` raises.
    """
    if config.data.prompt_format != CAPTION:
        raise UserError(
            f"The recipe's data.prompt_format is {config.data.prompt_format}, and that of captions is {CAPTION}: "
            "give a recipe such as captions-13b."
        )
    if not Path(images).is_dir():
        raise UserError(f"--images {images} is no folder: give the one with train2014/ and val2014/.")
    wanted = tuple(dict.fromkeys(splits or ("train", "val", "test")))
    source = Captions(Path(annotations), Path(images), wanted, config.compat is not None)
    return prepare(source, tokenizer, out, config, **options)


class RawSentence(RawRecord):
    raw: Unicode


class RawImage(RawRecord):
    filepath: Unicode
    filename: Unicode
    sentences: list[RawSentence] = Field(min_length=1)


@dataclass(frozen=True)
class Captions:
    """A `Source` (see records.py). A raw record is its split and its JSON."""

    annotations: Path
    images: Path
    wanted: tuple[str, ...]
    compat: bool
    kind = "captions"

    @property
    def where(self) -> str:
        return str(self.annotations)

    @property
    def root(self) -> Path:
        return self.images

    def listing(self) -> Listing:
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
            fault = Refused("cocoid", "stands twice") if id in seen else None
            seen.add(id)
            splits[SPLIT_OF[split]].append(Listed(str(id), (SPLIT_OF[split], record), fault))
        for name in self.wanted:
            if not splits.get(name):
                known = ", ".join(name for name, listed in splits.items() if listed)
                raise UserError(f"{self.annotations} has no image of split '{name}': it has {known}.")
        return Listing({name: splits[name] for name in self.wanted}, {"annotations": sha256})

    def read(self, listed: Listed) -> Record:
        split, raw = listed.raw
        record = RawImage.check(raw)
        captions = tuple(sentence.raw.strip() for sentence in record.sentences)
        if not all(captions):
            raise Refused("sentences", "have an empty caption")
        image = path_below("filename", record.filepath, record.filename)
        turns = [Instruction(CAPTION_INSTRUCTION, "", caption, self.compat) for caption in captions]
        if split == "train":
            texts = [Text(f"{listed.id}.{n}", (turn,)) for n, turn in enumerate(turns)]
            return Record(tuple(texts), image)
        return Record((Text(listed.id, (turns[0],), references=captions),), image)
