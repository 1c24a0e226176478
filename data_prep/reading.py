"""Reading files that may be malformed or hostile: JSON, the records in it, and the images that they name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from lavin_ds.data_prep.records import Refused
from lavin_ds.errors import UserError

MAX_IMAGE_BYTES = 200_000_000
UTF8_MARK = b"\xef\xbb\xbf"  # some Windows editors put it before the text
NAMES = {dict: "mapping", list: "list"}  # of JSON values, in errors


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate. JSON escapes can spell one, and no tokenizer accepts it."""
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
# Some data sets write null for a missing text.
OptionalText = Annotated[Unicode, BeforeValidator(lambda value: "" if value is None else value)]


class RawRecord(BaseModel):
    """The keys of a record that are used. Other keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    @classmethod
    def check(cls, raw: Any):
        """Makes a record of a JSON value; raises Refused with the first key that is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "record"
            message = problem["msg"].removeprefix("Value error, ")
            reason = "is missing" if problem["type"] == "missing" else f"is refused: {message}"
            raise Refused(key, reason) from None


def comma_separated(words: str) -> tuple[str, ...]:
    """The names in an option such as `train,val`, without repeats."""
    return tuple(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))


def is_plain_name(name: str) -> bool:
    """Whether a string names something directly in a folder: it has no separators and is not `..`."""
    printable = name.isprintable() and not set(name) & set("/\\:")
    return printable and name not in ("", ".", "..")


def path_below(key: str, *parts: str) -> str:
    """Joins names or relative paths that a record gives; raises Refused if the result could leave the folder.

    Symbolic links are followed, because the folder's owner made them and not the record.
    """
    for part in parts:
        if not part or not all(map(is_plain_name, part.split("/"))):
            raise Refused(key, f"'{part}' is not a plain relative path inside the image folder")
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
    """A JSON file's value and the SHA-256 of its bytes. Errors use `layout` to say what was expected.

    Raises:
        UserError: the file is missing, is not UTF-8 or not JSON, does not hold a `kind` (dict or list), or has the same
            key twice in a mapping.
    """
    try:
        content = path.read_bytes()
        raw = json.loads(content.removeprefix(UTF8_MARK).decode("utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {layout}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}: save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        if _is_json_lines(content):
            remedy = f". `jq -s . {path.name} > list.json` makes one" if kind is list else ""
            raise UserError(
                f"{path} is JSON Lines, but must be a single JSON {NAMES[kind]}: {layout}{remedy}."
            ) from None
        raise UserError(f"{path} is not valid JSON ({error}): download or write it again.") from None
    if not isinstance(raw, kind):
        raise UserError(
            f"{path} must hold a JSON {NAMES[kind]}, but holds a {NAMES.get(type(raw), 'single value')}: {layout}."
        )
    return raw, hashlib.sha256(content).hexdigest()


def read_json_lines(path: Path, layout: str) -> tuple[list[tuple[int, Any]], str]:
    """The values of a JSON Lines file, each with its line number (from 1), and the SHA-256 of the file's bytes.

    The value of a line that cannot be read is a Refused. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, or none of its lines can.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {layout}.") from None
    values: list[tuple[int, Any]] = []
    for number, line in enumerate(content.removeprefix(UTF8_MARK).split(b"\n"), 1):
        if line.strip():
            values.append((number, _value(line)))
    if values and all(isinstance(value, Refused) for _, value in values):
        raise UserError(f"{path} is not JSON Lines (one JSON value per line): {layout}.")
    return values, hashlib.sha256(content).hexdigest()


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        return Refused("line", f"is not valid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Refused("line", f"is not valid JSON ({error})")


def _is_json_lines(content: bytes) -> bool:
    """Whether each of the first two lines is a whole JSON value."""
    try:
        lines = [line for line in content.decode("utf-8").split("\n", 2)[:2] if line.strip()]
        return len(lines) == 2 and all(isinstance(json.loads(line), dict | list) for line in lines)
    except (ValueError, RecursionError):
        return False


def _without_repeats(pairs: list[tuple]) -> dict:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{repeated}' appears twice in one mapping")
    return mapping
