"""The kinds of data that `lavin-ds prep` reads, and their prompt formats.

A new kind is one file like these, and its class in SOURCES.
"""

from __future__ import annotations

from difflib import get_close_matches

from lavin_ds.data_prep.captions import Captions
from lavin_ds.data_prep.instruct import Instruct
from lavin_ds.data_prep.own import Own
from lavin_ds.data_prep.records import Source, in_words
from lavin_ds.data_prep.scienceqa import ScienceQA

SOURCES: dict[str, type[Source]] = {source.kind: source for source in (ScienceQA, Instruct, Captions, Own)}


def check_prompt_format(format: str) -> None:
    """Raises ValueError, with the known formats, if no kind of data has this format."""
    known = {name: None for source in SOURCES.values() for name in source.formats}
    if format in known:
        return
    near = get_close_matches(format, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    listed = "; ".join(f"{kind} has {in_words(source.formats)}" for kind, source in SOURCES.items())
    raise ValueError(f"'{format}' is not a known prompt format.{meant} {listed}")
