"""What the sources of records share: a record as listed, checked or refused, and reading files nobody vouches for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from lavin_ds.data.samples import Turn
from lavin_ds.errors import UserError

MAX_IMAGE_BYTES = 200_000_000
NAMES = {dict: "mapping", list: "list"}  # of JSON's values


class Refused(Exception):
    """Why a record cannot be used: the key that is wrong, and the reason as a clause."""

    @property
    def key(self) -> str:
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class Offender:
    """A record, or a sample of one, that is left out or not trained on: where it is, which key of it, and why."""

    split: str
    id: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split} {self.id}: {self.key} {self.reason}"


@dataclass(frozen=True)
class Listed:
    """A record as its source lists it, not yet looked into. `fault`: why the list alone shows it to be unusable."""

    id: str
    raw: Any
    fault: Refused | None = None


@dataclass(frozen=True)
class Text:
    """One sample of a record: its turns, and the columns that only one kind of data has (see ROW_SCHEMA)."""

    id: str
    turns: tuple[Turn, ...]
    has_hint: bool = False
    answer: int = -1
    n_choices: int = 0
    subject: str = ""
    grade: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A checked record: its samples, and the image that they show, as a path below the source's root."""

    texts: tuple[Text, ...]
    image: str = ""


@dataclass(frozen=True)
class Listing:
    """Every record of a source in order, by split, and the SHA-256 of every file that lists them."""

    splits: dict[str, list[Listed]]
    sha256: dict[str, str]


class Source(Protocol):
    """A kind of data to prepare: it lists records, and says for each how to become samples with an image.

    It goes to the workers, so it holds paths and settings and not the records.
    """

    kind: str  # as in the manifest

    @property
    def where(self) -> str:
        """The files that list the records, for people."""

    @property
    def root(self) -> Path:
        """The folder that paths of images start from."""

    def listing(self) -> Listing:
        """Reads the files that list the records; UserError if one is missing or malformed."""

    def read(self, listed: Listed) -> Record:
        """Checks one record; raises Refused."""


def is_unicode(text: str) -> bool:
    """JSON escapes can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _whole_characters(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("it holds half a character (a lone surrogate)")
    return text


Unicode = Annotated[str, AfterValidator(_whole_characters)]
# Derived sets write null for a text that is not there.
OptionalText = Annotated[Unicode, BeforeValidator(lambda value: "" if value is None else value)]


class RawRecord(BaseModel):
    """The keys of a source's record that are used; others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @classmethod
    def check(cls, raw: Any):
        """The record of a JSON value; raises Refused with the first key that is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "record"
            message = problem["msg"].removeprefix("Value error, ")
            reason = "is missing" if problem["type"] == "missing" else f"is refused: {message}"
            raise Refused(key, reason) from None


def is_plain_name(name: str) -> bool:
    """Whether a string can only name something directly in a folder."""
    printable = name.isprintable() and not set(name) & set("/\\:")
    return printable and name not in ("", ".", "..")


def path_below(key: str, *parts: str) -> str:
    """A path of plain names, from names or relative paths that a record gives; raises Refused if it would leave.

    Links are followed: they are the folder owner's, not the record's.
    """
    for part in parts:
        if not part or not all(map(is_plain_name, part.split("/"))):
            raise Refused(key, f"'{part}' would leave the image folder")
    return str(PurePosixPath(*parts))


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file; raises Refused."""
    try:
        if not path.is_file():
            raise Refused("image", f"{path} is missing")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise Refused("image", f"{path} is larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise Refused("image", f"{path} cannot be read ({error.strerror})") from None


def read_json(path: Path, kind: type, layout: str) -> tuple[Any, str]:
    """A JSON file's value and the SHA-256 of its bytes. `layout` says in the error what was expected.

    Raises:
        UserError: it is missing, not UTF-8, not JSON, no `kind` (dict or list), or says a key of a mapping twice.
    """
    try:
        content = path.read_bytes()
        raw = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {layout}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}: save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        if _is_json_lines(content):
            remedy = f". `jq -s . {path.name} > list.json` makes one" if kind is list else ""
            raise UserError(
                f"{path} is JSON Lines, and must be a single JSON {NAMES[kind]}: {layout}{remedy}."
            ) from None
        raise UserError(f"{path} is not valid JSON ({error}): download or write it again.") from None
    if not isinstance(raw, kind):
        raise UserError(
            f"{path} must hold a JSON {NAMES[kind]}, and holds a {NAMES.get(type(raw), 'single value')}: {layout}."
        )
    return raw, hashlib.sha256(content).hexdigest()


def _is_json_lines(content: bytes) -> bool:
    """Whether the first two lines are JSON values of their own."""
    try:
        lines = [line for line in content.decode("utf-8").split("\n", 2)[:2] if line.strip()]
        return len(lines) == 2 and all(isinstance(json.loads(line), dict | list) for line in lines)
    except (ValueError, RecursionError):
        return False


def _without_repeats(pairs: list[tuple]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{repeated}' stands twice in one mapping")
    return mapping
