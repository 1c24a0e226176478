"""What a registry of models/ holds: where a kind's class is, and what a recipe may say of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Kind:
    """A kind by its class and its own keys, which a recipe gives under `options`."""

    where: str | type  # the class, or "module:Class": imported when a model is built
    options: type[BaseModel] | None = None  # what the kind's own keys may be; None: it has none

    def load(self) -> type:
        """The class."""
        return resolve_name(self.where) if isinstance(self.where, str) else self.where

    def wrong_options(self, name: str, options: Mapping[str, object]) -> list[str]:
        """What is wrong with the options given to the kind called `name`."""
        if self.options is None:
            return [f"kind {name} has no options, but {key} is given" for key in options]
        try:
            self.options.model_validate(options)
        except ValidationError as error:
            return [f"options.{'.'.join(map(str, e['loc']))} of kind {name}: {e['msg']}" for e in error.errors()]
        return []
