"""Decodes an answer while it grows, without incomplete characters and without stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from lavin_ds.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoding gives for bytes that are not a whole character


class AnswerText:
    """The text of an answer's ids. All ids are decoded each time, because single ids lose spaces and characters."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop

    def whole(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of a finished answer, cut before the first stop string; and whether there was one."""
        # A base's vocabulary may be larger than its tokenizer's. The extra ids have no text.
        text = self.tokenizer.decode([id for id in ids if id < self.tokenizer.vocab_size])
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def growing(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of an unfinished answer, as far as it can no longer change; and whether a stop string ends it.

        Left out are bytes that may become a character, and an end that may become a stop string.
        """
        text, stopped = self.whole(ids)
        if stopped:
            return text, True
        text = text.rstrip(BROKEN)
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is also a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
