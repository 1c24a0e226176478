"""One line of the checklist that `lavin-ds validate` prints and `lavin-ds train` refuses by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lavin_ds.errors import UserError


@dataclass(frozen=True)
class Check:
    """found: what is there, or what is wrong and what to do about it. warning: it passed by --force alone."""

    name: str
    found: str
    passed: bool
    warning: bool = False


def refuse(checks: list[Check]) -> None:
    """Raises UserError with the sentence of the check that failed, or a list if several did."""
    wrong = [check.found for check in checks if not check.passed]
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        raise UserError(f"{len(wrong)} things are wrong:" + "".join(f"\n  {said}" for said in wrong))


def nearest_folder(out: Path) -> Path:
    """The folder itself if it exists, or the nearest one above it."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
