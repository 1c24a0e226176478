"""The records of a running job: the image of each, and which are left out and why."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from lavin_ds.data.schema import PromptSettings
from lavin_ds.data_prep.records import Listing, Source

SHOWN = 20  # bad records named in an error


@dataclass(frozen=True)
class Offender:
    """A record, or one of its samples, that is left out or not trained on; with the wrong key and the reason."""

    split: str
    id: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.split} {self.id}: {self.key} {self.reason}"


@dataclass
class Catalogue:
    """A record is identified by its split and its number in the split, an image by its place in `images`."""

    source: Source
    prompt: PromptSettings
    listing: Listing
    images: list[tuple[str, str]] = field(default_factory=list)  # distinct files: SHA-256, and where first found
    image_of: dict[str, array] = field(default_factory=dict)  # by split: each record's place in `images`, or -1
    image_rows: array = field(default_factory=lambda: array("i"))  # by place: row of the image table, -1 if unusable
    # Keys are (number of the split, number of the record), so sorted keys are in the order of the records.
    _bad: dict[tuple[int, int], list[Offender]] = field(default_factory=lambda: defaultdict(list))
    _untrained: dict[tuple[int, int], list[Offender]] = field(default_factory=lambda: defaultdict(list))

    def reject(self, split: str, number: int, key: str, reason: str, id: str | None = None) -> None:
        """Leaves a record out. `id` names the sample at fault if the record has several."""
        self._add(self._bad, split, number, key, reason, id)

    def number_images(self, bad: dict[int, str]) -> None:
        """Gives each image its row of the image table, and leaves out the records whose image is in `bad`.

        bad: the place of each unusable image, with the reason.
        """
        row = 0
        for place in range(len(self.images)):
            self.image_rows.append(-1 if place in bad else row)
            row += place not in bad
        for split, places in self.image_of.items() if bad else ():
            for number, place in enumerate(places):
                if place in bad:
                    record = self.source.read(self.listing.splits[split][number], self.prompt)
                    self.reject(split, number, "image", f"{self.source.root / record.image} {bad[place]}")

    def note_untrained(self, split: str, number: int, key: str, reason: str, id: str) -> None:
        """Notes a sample that is not trained on although its record is good."""
        self._add(self._untrained, split, number, key, reason, id)

    def rejected(self, split: str) -> int:
        """The number of records of a split that are left out."""
        return sum(own == self._order(split) for own, _ in self._bad)

    def good(self, split: str, numbers: range) -> array:
        """The `numbers` whose records are not left out."""
        order = self._order(split)
        return array("i", (number for number in numbers if (order, number) not in self._bad))

    def image_row(self, split: str, number: int) -> int:
        """The row of a record's image in the image table, or -1."""
        place = self.image_of[split][number]
        return self.image_rows[place] if place >= 0 else -1

    def bad(self) -> list[Offender]:
        return [offender for key in sorted(self._bad) for offender in self._bad[key]]

    def left_out(self) -> list[Offender]:
        """Everything left out or not trained on, in the order of the records."""
        keys = sorted({*self._bad, *self._untrained})
        return [offender for key in keys for offender in (*self._bad.get(key, ()), *self._untrained.get(key, ()))]

    def complaint(self) -> str:
        """The error's text: the first SHOWN bad records, one per line, the number of others, and what to do."""
        bad = self.bad()
        lines = [str(offender) for offender in bad[:SHOWN]] or ["all good ones are over the length limit"]
        if len(bad) > SHOWN:
            lines.append(f"and {len(bad) - SHOWN:,} more")
        remedy = "Correct them or leave them out with --on-error skip"
        if any(offender.key == "length" for offender in bad):
            remedy += "; for those that are too long, raise data.max_length or set data.overlength to shorten or drop"
        if len(bad) > 1 and all(o.key == "image" and o.reason.endswith("is missing") for o in bad):
            remedy += f"; or do their paths start from another folder than {self.source.root}?"
        s = "s" * (len(bad) != 1)
        listed = "".join(f"\n  {line}" for line in lines)
        end = "" if remedy.endswith("?") else "."
        return f"{len(bad):,} bad record{s} in {self.source.where}:{listed}\n{remedy}{end}"

    def _add(self, where: dict, split: str, number: int, key: str, reason: str, id: str | None) -> None:
        id = id or self.listing.splits[split][number].id
        offender = Offender(split, id.encode("utf-8", "replace").decode(), key, reason)
        where[self._order(split), number].append(offender)

    def _order(self, split: str) -> int:
        return list(self.listing.splits).index(split)
