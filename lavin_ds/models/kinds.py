"""An entry of the adapter and neck registries: a kind's class and the options a recipe may give. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Kind:
    """The class of a kind, and the keys that a recipe may set under `options`."""

    where: str | type  # the class, or "module:Class", which is imported when a model is built
    options: type[BaseModel] | None = None  # a pydantic model of the kind's options; None if it has none

    def load(self) -> type:
        """The class."""
        return resolve_name(self.where) if isinstance(self.where, str) else self.where

    def wrong_options(self, name: str, options: Mapping[str, object]) -> list[str]:
        """What is wrong with these options of the kind called `name`; empty if nothing is."""
        if self.options is None:
            return [f"kind {name} has no options, but {key} is given" for key in options]
        try:
            self.options.model_validate(options)
        except ValidationError as error:
            return [f"options.{'.'.join(map(str, e['loc']))} of kind {name}: {e['msg']}" for e in error.errors()]
        return []
