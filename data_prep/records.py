"""The interface of a kind of data: where its records are, and which samples each record becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lavin_ds.data.prompts import Turn
    from lavin_ds.data.schema import PromptSettings


class Refused(Exception):
    """A record cannot be used: the key that is wrong, and the reason as a clause."""

    @property
    def key(self) -> str:
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class Listed:
    """A record as its source lists it, not yet checked. `fault` is set if the list alone shows that it is unusable."""

    id: str
    raw: Any
    fault: Refused | None = None


@dataclass(frozen=True)
class Listing:
    """Every record of a source in order, by split, and the SHA-256 of every file that lists them."""

    splits: dict[str, list[Listed]]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Text:
    """One sample of a record: its turns, and the columns that only some kinds of data have (see ROW_SCHEMA)."""

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
    """A checked record: its samples, and their image as a path below the source's root ("" for none)."""

    texts: tuple[Text, ...]
    image: str = ""


def option(help: str, default: Any = MISSING) -> Any:
    """A field of a source that is an option on the command line. It is required if it has no default."""
    return field(default=default, metadata={"help": help})


class Source(ABC):
    """A kind of data. A subclass is a frozen dataclass whose fields are its options on the command line.

    Its docstring is the help of `lavin-ds prep KIND`. Sources are sent to worker processes, so they hold options
    and no records.
    """

    kind: ClassVar[str]  # the command's name, and `kind` in the manifest
    formats: ClassVar[tuple[str, ...]]  # the values of data.prompt_format that it supports
    recipe: ClassVar[str]  # the default of --recipe

    @property
    @abstractmethod
    def where(self) -> str:
        """The files that list the records, as errors name them."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that paths of images start from."""

    @abstractmethod
    def listing(self, prompt: PromptSettings) -> Listing:
        """Reads the files that list the records.

        Raises:
            UserError: a file is missing or malformed, or the options contradict each other.
        """

    @abstractmethod
    def read(self, listed: Listed, prompt: PromptSettings) -> Record:
        """Checks one record and makes its samples; raises Refused."""


def in_words(names: tuple[str, ...]) -> str:
    """Names joined with "or"; only the first three of a long list."""
    if len(names) <= 6:
        return " or ".join(names)
    return f"{', '.join(names[:3])} or {len(names) - 3} more"
