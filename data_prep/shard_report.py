"""What is in a shard directory: counts, lengths, labels, the padding that training would compute, and single samples.

It needs only the shards: no weights and no torch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lavin_ds.data.layout import lay_out
from lavin_ds.data.sampler import assign, global_batch_indices
from lavin_ds.data.schema import REJECTS_NAME, LengthCounts, Manifest, load_manifest
from lavin_ds.data.shards import ShardReader
from lavin_ds.errors import UserError

STEPS_LOOKED_AT = 200  # optimizer steps whose padding is counted
BINS = 16  # of the histograms

Kind = Literal["modality token", "BOS", "prefix", "visual slot", "prompt", "label"]


@dataclass(frozen=True)
class SplitReport:
    """One split. A length counts the positions of a sample laid out for training, with its modality token.

    trainable: the number of rows that have labels. label_share: the share of their positions that is labelled.
    histogram_*: rows per bin of lengths. Bin 0 holds lengths 1 to Report.bin_width, bin 1 those up to twice that, etc.
    """

    rows: int
    rows_text: int
    rows_image: int
    trainable: int
    median: int
    mean: float
    longest: int
    label_share: float
    lengths: LengthCounts
    rejected: int
    histogram_text: list[int]
    histogram_image: list[int]


@dataclass(frozen=True)
class Padding:
    """The share of computed positions that are not padding, for several ways to make micro-batches.

    to_max_length: each sample is padded to data.max_length. sampler: as in training without packing. with_waiting: as
    `sampler`, but the time that ranks wait for the slowest one counts as computed positions. packed: with
    training.packing. None if there are too few samples for so many ranks.
    """

    ranks: int
    to_max_length: float
    sampler: float | None
    with_waiting: float | None
    packed: float | None


@dataclass(frozen=True)
class Report:
    directory: Path
    manifest: Manifest
    bytes: int
    splits: dict[str, SplitReport]
    bin_width: int
    rejects: dict[str, int]  # samples in rejects.jsonl, by the key that was wrong
    global_batch: int
    micro_batch: int
    padding: list[Padding]  # of split `train`, or of the first split if there is no `train`

    def as_dict(self) -> dict:
        splits = {name: asdict(split) | {"lengths": split.lengths.model_dump()} for name, split in self.splits.items()}
        return {
            "directory": str(self.directory),
            "bytes": self.bytes,
            "splits": splits,
            "bin_width": self.bin_width,
            "rejects": self.rejects,
            "global_batch": self.global_batch,
            "micro_batch": self.micro_batch,
            "padding": [asdict(padding) for padding in self.padding],
            "manifest": self.manifest.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Token:
    """One position of a sample: its id (None for the modality token), its text and its kind."""

    id: int | None
    text: str
    kind: Kind


@dataclass(frozen=True)
class SampleView:
    """A sample as the model sees it. `pixels` [S, S, 3] and `source`, its image's path, are None for text."""

    id: str
    split: str
    tokens: list[Token]
    pixels: np.ndarray | None
    source: str | None

    def spans(self) -> Iterator[tuple[Kind, int, int]]:
        """Runs of positions of the same kind, as (kind, first, last)."""
        start = 0
        for i in range(1, len(self.tokens) + 1):
            if i == len(self.tokens) or self.tokens[i].kind != self.tokens[start].kind:
                yield self.tokens[start].kind, start, i - 1
                start = i


def make_report(
    directory: Path, visual_tokens: int | None = None, global_batch: int = 32, micro_batch: int = 4
) -> Report:
    """Reads all splits.

    visual_tokens: per image, in the run that will read the shards. None: as the shards were prepared.

    Raises:
        UserError: the directory or a file in it cannot be read.
    """
    manifest = load_manifest(directory)
    visual = manifest.prompt.visual_tokens if visual_tokens is None else visual_tokens
    readers = {name: ShardReader(directory, name) for name in manifest.splits}
    longest = max(int(reader.lengths(visual).max()) + 1 for reader in readers.values())
    bin_width = math.ceil(longest / BINS)
    first = readers.get("train") or next(iter(readers.values()))
    return Report(
        directory=Path(directory),
        manifest=manifest,
        bytes=sum(file.bytes for file in manifest.all_files()),
        splits={name: _split_report(reader, visual, bin_width) for name, reader in readers.items()},
        bin_width=bin_width,
        rejects=_rejects(Path(directory) / REJECTS_NAME),
        global_batch=global_batch,
        micro_batch=micro_batch,
        padding=[_padding(first, visual, global_batch, micro_batch, ranks) for ranks in (1, 2, 8)],
    )


def view(directory: Path, split: str, sample: str | None = None, visual_tokens: int | None = None) -> SampleView:
    """One sample laid out for training, or for evaluation if it has no labels.

    sample: an id; if no row has this id, the number of a row, from 0. None: the first row with an image and labels, or
    the first row if there is none.

    Raises:
        UserError: there is no such split or sample, or the directory cannot be read.
    """
    reader = ShardReader(directory, split)
    visual = reader.manifest.prompt.visual_tokens if visual_tokens is None else visual_tokens
    row = reader.row(_find(reader, sample))
    ids, spans = (row.token_ids, row.label_spans) if len(row.label_spans) else (row.prompt_ids, np.zeros((0, 2)))
    has_image = row.image >= 0
    layout = lay_out(ids, spans, has_image, reader.frame, visual)
    head = len(reader.frame.head(has_image, visual))
    shows = has_image and visual > 0
    tokens = [Token(None, f"t_m:{'image' if shows else 'text'}", "modality token")]
    for i, (token, label) in enumerate(zip(layout.ids.tolist(), layout.labels.tolist(), strict=True)):
        if i == 0:
            kind: Kind = "BOS"
        elif 0 <= layout.visual_start <= i < layout.visual_start + visual:
            kind = "visual slot"
        elif i < head:
            kind = "prefix"
        else:
            kind = "label" if label >= 0 else "prompt"
        text = reader.tokenizer.piece(token)
        if kind == "visual slot":
            text = f"v{i - layout.visual_start}"
        elif kind == "BOS":
            text = "BOS"
        tokens.append(Token(token, text, kind))
    return SampleView(
        id=row.id,
        split=split,
        tokens=tokens,
        pixels=reader.image(row.image) if shows else None,
        source=reader.image_origin(row.image)[1] if has_image else None,
    )


def plot(report: Report, path: Path) -> None:
    """Draws a PNG of histograms of lengths: one panel per split, with text rows and image rows stacked."""
    import matplotlib

    from lavin_ds.files import write_atomically

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = _edges(report.bin_width)
    figure, axes = plt.subplots(
        len(report.splits), 1, figsize=(8, 1.2 + 2.2 * len(report.splits)), dpi=120, sharex=True, squeeze=False
    )
    for axis, (name, split) in zip(axes[:, 0], report.splits.items(), strict=True):
        text, image = np.array(split.histogram_text), np.array(split.histogram_image)
        bars = {"x": edges[:-1], "width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.6}
        axis.bar(height=text, color="tab:blue", label="text", **bars)
        axis.bar(height=image, bottom=text, color="tab:orange", label="image", **bars)
        axis.axvline(split.mean, color="0.3", linewidth=1, linestyle="--", label=f"mean {split.mean:.0f}")
        axis.set_title(f"{name}: {split.rows:,} rows, {split.label_share:.0%} of positions labelled", loc="left")
        axis.set(ylabel="rows", xlim=(0.5, edges[-1]))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper right")
    axes[-1, 0].set_xlabel(f"positions of a sample (data.max_length {report.manifest.prompt.max_length})")
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)


def _split_report(reader: ShardReader, visual_tokens: int, bin_width: int) -> SplitReport:
    entry = reader.manifest.splits[reader.split]
    lengths, has_image = reader.lengths(visual_tokens) + 1, reader.has_pixels
    trained = lengths[reader.trainable]
    edges = _edges(bin_width)
    return SplitReport(
        rows=len(reader),
        rows_text=int((~has_image).sum()),
        rows_image=int(has_image.sum()),
        trainable=len(trained),
        median=int(np.percentile(lengths, 50, method="lower")),  # as prep computes it
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        label_share=float(reader.label_counts.sum() / trained.sum()) if len(trained) else 0.0,
        lengths=entry.lengths,
        rejected=entry.rejected,
        histogram_text=np.histogram(lengths[~has_image], edges)[0].tolist(),
        histogram_image=np.histogram(lengths[has_image], edges)[0].tolist(),
    )


def _edges(bin_width: int) -> np.ndarray:
    """Edges of the bins. A bin ends at a multiple of bin_width and includes it."""
    return np.arange(BINS + 1) * bin_width + 0.5


def _padding(reader: ShardReader, visual_tokens: int, global_batch: int, micro_batch: int, ranks: int) -> Padding:
    """Counts over the first STEPS_LOOKED_AT optimizer steps with seed 0."""
    samples, lengths = reader.trainable, reader.lengths(visual_tokens)
    if not len(samples):
        return Padding(ranks, 0.0, None, None, None)
    has_image = reader.has_pixels & (visual_tokens > 0)
    to_max = float(lengths[samples].mean() / (reader.manifest.prompt.max_length - 1))
    counted, computed, slowest, packed = 0, 0, 0, 0
    for step in range(max(1, min(STEPS_LOOKED_AT, len(samples) // global_batch))):
        chosen = samples[global_batch_indices(len(samples), global_batch, 0, step)]
        counted += lengths[chosen].sum()
        try:
            dealt = assign(chosen, lengths[chosen], has_image[chosen], ranks, micro_batch)
        except UserError:  # too few samples for so many ranks
            return Padding(ranks, to_max, None, None, None)
        work = np.array([[len(piece) * lengths[piece].max() for piece in part] for part in dealt])
        computed += work.sum()
        slowest += ranks * work.max(0).sum()
        packed += sum(lengths[piece].sum() for part in dealt for piece in part)
    return Padding(ranks, to_max, float(counted / computed), float(counted / slowest), float(counted / packed))


def _rejects(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(Counter(json.loads(line)["key"] for line in file).most_common())


def _find(reader: ShardReader, sample: str | None) -> int:
    if sample is None:
        wanted = np.flatnonzero(reader.has_pixels & (reader.label_counts > 0))
        return int(wanted[0]) if len(wanted) else 0
    for index in range(len(reader)):
        if reader.id(index) == sample:
            return index
    if sample.isdecimal() and int(sample) < len(reader):
        return int(sample)
    raise UserError(
        f"Split '{reader.split}' of {reader.directory} has no sample '{sample}': give one of its ids, such as "
        f"{reader.id(0)}, or a row's number below {len(reader)}."
    )
