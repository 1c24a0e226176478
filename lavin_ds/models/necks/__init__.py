"""Necks: from the rows that the vision tower hands out to visual tokens in the LLM's width. One file a family.

    kind    class       visual tokens  what it is                                        source
    lavin   rowwise.py  one a row      a bottleneck with a SiLU                          paper 1, eq. 6
    linear  rowwise.py  one a row      one projection                                    LLaVA (arXiv:2304.08485), eq. 1

A new kind is one file and one `register`. How many visual tokens an image becomes is the neck's to say. A recipe is
read without torch, so that number stands here, in `NeckKind`, and this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavin_ds.models.kinds import Kind

if TYPE_CHECKING:
    from lavin_ds.config import NeckConfig


def one_a_row(config: NeckConfig, rows: int) -> int:
    return rows


@dataclass(frozen=True)
class NeckKind(Kind):
    """`visual_tokens` takes the neck's configuration and how many rows the tower hands out for an image."""

    visual_tokens: Callable[[NeckConfig, int], int] = one_a_row


KINDS: dict[str, NeckKind] = {}


def register(name: str, kind: NeckKind) -> None:
    """Makes `kind` known to recipes by `name`."""
    if name in KINDS:
        raise ValueError(f"there is a neck kind {name} already")
    KINDS[name] = kind


register("lavin", NeckKind(f"{__name__}.rowwise:LavinNeck"))
register("linear", NeckKind(f"{__name__}.rowwise:LinearNeck"))
