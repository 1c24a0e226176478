"""One check of a run. `lavin-ds validate` prints the checks; `lavin-ds train` does not start if one fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.errors import UserError


@dataclass(frozen=True)
class Check:
    """found: what the check found, or what is wrong and what to do. warning: it passed only because of --force."""

    name: str
    found: str
    passed: bool
    warning: bool = False


def refuse(checks: list[Check]) -> None:
    """Raises UserError if a check failed, with its sentence, or with a list if several failed."""
    wrong = [check.found for check in checks if not check.passed]
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        raise UserError(f"{len(wrong)} things are wrong:" + "".join(f"\n  {said}" for said in wrong))


def nearest_folder(out: Path) -> Path:
    """The folder itself if it exists, or the nearest one above it."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
