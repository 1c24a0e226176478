"""Measures sampler and reader: padding and waiting, rows per second, and the time to start within an epoch.

    python benchmarks/loader.py [--rows N] [--data SHARDS] [--folder DIR] [--json]

1. The share of computed tokens that are not padding, and how evenly ranks work, with a global batch of 32 and
   micro-batches of 4. Several ways to make micro-batches are compared with the authors' (every sample padded to 512).
   Lengths are those of SHARDS' train split, or else the lengths that the profiler assumes for ScienceQA.
2. Random rows per second, read and collated by two processes, from a set of N rows (default 210,000) and from a set a
   tenth of that size. If the rates are equal, reading a row takes O(1).
3. Seconds until the first batch, with nothing opened before, at the start and in the middle of an epoch of N rows.

The exit code is 1 if on one rank less than 0.90 of the tokens are not padding, or if a start takes a second or more.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from harness import show

import numpy as np
import typer
from rich.table import Table

from lavin_ds.config import load_recipe
from lavin_ds.data.collate import collate
from lavin_ds.data.sampler import assign, global_batch_indices
from lavin_ds.data.schema import (
    MANIFEST_NAME,
    ROW_SCHEMA,
    SCHEMA_VERSION,
    LengthCounts,
    Manifest,
    PromptSettings,
    SplitEntry,
    TokenizerEntry,
)
from lavin_ds.data.shards import ROW_BATCH, ShardReader, write_shard
from lavin_ds.files import write_json
from lavin_ds.profiling.training_set import scienceqa

GLOBAL_BATCH, MICRO_BATCH, MAX_LENGTH, STEPS = 32, 4, 512, 300
RANKS = (1, 2, 8)
FILE_ROWS = 8192
ENOUGH, SOON = 0.90, 1.0

Cut = Callable[[np.ndarray, np.ndarray, np.ndarray, int], list[list[np.ndarray]]]


def in_order(chosen, lengths, has_image, ranks) -> list[list[np.ndarray]]:
    """Micro-batches of MICRO_BATCH samples in the given order."""
    pieces = np.split(chosen, len(chosen) // MICRO_BATCH)
    return [pieces[rank::ranks] for rank in range(ranks)]


def by_count(chosen, lengths, has_image, ranks) -> list[list[np.ndarray]]:
    """Micro-batches of MICRO_BATCH samples, sorted by length."""
    return in_order(chosen[np.argsort(-lengths[chosen], kind="stable")], lengths, has_image, ranks)


def by_work(chosen, lengths, has_image, ranks) -> list[list[np.ndarray]]:
    return assign(chosen, lengths[chosen], has_image[chosen], ranks, MICRO_BATCH)


def packed(chosen, lengths, has_image, ranks) -> list[list[np.ndarray]]:
    return assign(chosen, lengths[chosen], has_image[chosen], ranks, MICRO_BATCH, packing=True)


def to_longest(lengths: np.ndarray) -> int:
    return len(lengths) * int(lengths.max())


METHODS: dict[
    str, tuple[Cut, Callable[[np.ndarray], int]]
] = {  # how samples are dealt; computed tokens of a micro-batch
    "as they come, padded to 512 (authors)": (in_order, lambda lengths: MICRO_BATCH * (MAX_LENGTH - 1)),
    "as they come, padded to the longest": (in_order, to_longest),
    "sorted, equal counts": (by_count, to_longest),
    "sorted, equal work (default)": (by_work, to_longest),
    "packed (training.packing)": (packed, lambda lengths: int(lengths.sum())),
}


def padding(lengths: np.ndarray, has_image: np.ndarray) -> Iterator[dict]:
    """Results of every method with every number of ranks, over the same STEPS global batches."""
    for ranks in RANKS:
        for name, (cut, tokens_of) in METHODS.items():
            counted = computed = slowest = largest = 0
            for step in range(STEPS):
                chosen = global_batch_indices(len(lengths), GLOBAL_BATCH, 0, step)
                dealt = cut(chosen, lengths, has_image, ranks)
                work = np.array([[tokens_of(lengths[piece]) for piece in part] for part in dealt])
                counted += lengths[chosen].sum()
                computed += work.sum()
                slowest += work.max(0).sum()  # in every micro-batch all ranks wait for the slowest
                largest = max(largest, work.max())
            yield {
                "ranks": ranks,
                "method": name,
                "counted_per_computed": float(counted / computed),
                "slowest_rank_to_mean": float(ranks * slowest / computed),
                "busy": float(counted / (ranks * slowest)),
                "largest_micro_batch": int(largest),
            }


def write_set(folder: Path, rows: int) -> Path:
    """A shard directory of text rows with ScienceQA's lengths and random tokens."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lengths = rng.choice(scienceqa(MAX_LENGTH).lengths - 7, rows)
    tokens = rng.integers(3, 32_000, MAX_LENGTH).astype(np.int32)

    def made(start: int, stop: int) -> Iterator[dict]:
        for i in range(start, stop):
            n = int(lengths[i])
            yield {
                "id": str(i),
                "token_ids": tokens[:n],
                "label_spans": [n // 3, n],
                "label_count": n - n // 3,
                "prompt_length": n // 3,
                "prompt_ids": [],
                "image": -1,
                "has_image": False,
                "has_hint": False,
                "answer": 0,
                "n_choices": 2,
                "subject": "natural science",
                "grade": "grade1",
                "references": [],
            }

    starts = range(0, rows, FILE_ROWS)
    files = [
        write_shard(folder / f"train-{k:05d}.arrow", ROW_SCHEMA, made(i, min(i + FILE_ROWS, rows)), ROW_BATCH)
        for k, i in enumerate(starts)
    ]
    split = SplitEntry(files=files, rows=rows, images=0, records=rows, lengths=LengthCounts(whole=rows))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind="scienceqa",
        created_by="benchmarks/loader.py",
        splits={"train": split},
        images=None,
        tokenizer=TokenizerEntry(sha256="", vocab_size=32_000, bos=1, eos=2),
        prefix_image=[7084, 29901, 29871],
        prefix_text=[7084, 29901, 405, 29914, 29909],
        prompt=PromptSettings.of(load_recipe("lavin-7b")),
    )
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return folder


def read_at_random(folder: Path, seed: int, batches: int, seconds) -> None:
    """One process: collates `batches` batches of random rows and puts the seconds into the queue."""
    reader = ShardReader(folder, "train")
    order = np.random.default_rng(seed).integers(0, len(reader), (batches, MICRO_BATCH))
    collate([reader.row(int(i)) for i in order[0]], reader.image, reader.frame, 6)
    began = time.perf_counter()
    for indices in order:
        collate([reader.row(int(i)) for i in indices], reader.image, reader.frame, 6)
    seconds.put(time.perf_counter() - began)


def rows_per_second(folder: Path, processes: int = 2, batches: int = 5_000) -> float:
    context = multiprocessing.get_context("spawn")
    seconds = context.Queue()
    readers = [context.Process(target=read_at_random, args=(folder, p, batches, seconds)) for p in range(processes)]
    for reader in readers:
        reader.start()
    longest = max(seconds.get(timeout=300) for _ in readers)
    for reader in readers:
        reader.join()
    return processes * batches * MICRO_BATCH / longest


def start(folder: Path, step: int, ranks: int = 8) -> float:
    """Seconds until the first micro-batch of an optimizer step is collated. Nothing is opened before."""
    began = time.perf_counter()
    reader = ShardReader(folder, "train")
    lengths, samples, has_image = reader.lengths(6), reader.trainable, reader.has_pixels
    chosen = samples[global_batch_indices(len(samples), GLOBAL_BATCH, 0, step)]
    pieces = assign(chosen, lengths[chosen], has_image[chosen], ranks, MICRO_BATCH)[0]
    collate([reader.row(int(i)) for i in pieces[0]], reader.image, reader.frame, 6)
    return time.perf_counter() - began


def main(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the synthetic set.")] = 210_000,
    data: Annotated[Path | None, typer.Option(help="Shards to take lengths from.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to write the synthetic sets; removed afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure sampler and reader."""
    if data:
        reader = ShardReader(data, "train")
        lengths, has_image = reader.lengths(6)[reader.trainable], reader.has_pixels[reader.trainable]
    else:
        lengths = scienceqa(MAX_LENGTH).lengths - 1
        has_image = np.random.default_rng(0).random(len(lengths)) < scienceqa(MAX_LENGTH).image_fraction
    cut = list(padding(lengths, has_image))
    parent = Path(tempfile.mkdtemp(dir=folder))
    try:
        large, small = write_set(parent / "large", rows), write_set(parent / "small", rows // 10)
        reading = {n: rows_per_second(path) for n, path in ((rows // 10, small), (rows, large))}
        middle = rows // GLOBAL_BATCH // 2
        starts = {step: start(large, step) for step in (0, middle, 3 * rows // GLOBAL_BATCH + middle)}
    finally:
        shutil.rmtree(parent)
    one_rank = {c["method"]: c["counted_per_computed"] for c in cut if c["ranks"] == 1}
    passed = one_rank["sorted, equal work (default)"] >= ENOUGH and max(starts.values()) < SOON
    source = data or "ScienceQA, assumed"
    show(
        {"passed": passed, "padding": cut, "rows_per_second": reading, "start": starts},
        as_json,
        _table(cut, f"{len(lengths):,} samples ({source}), mean {lengths.mean():.0f} tokens"),
        *(
            f"2 processes read and collate {rate:,.0f} random rows per second from {n:,} rows"
            for n, rate in reading.items()
        ),
        *(f"first batch of step {step:,} of {rows:,} rows: {s:.2f} s after a cold start" for step, s in starts.items()),
    )
    raise typer.Exit(0 if passed else 1)


def _table(cut: list[dict], title: str) -> Table:
    caption = (
        "count: share of computed tokens that are not padding; wait: work of the slowest rank over the mean; busy: "
        "share of all ranks' time spent on tokens that are not padding; largest: tokens of the largest micro-batch"
    )
    title += f"; micro-batches of {MICRO_BATCH} of a global batch of {GLOBAL_BATCH}"
    table = Table(title=title, caption=caption)
    for column in ("ranks", "micro-batches", "count", "wait", "busy", "largest"):
        table.add_column(column, justify="left" if column == "micro-batches" else "right", no_wrap=True)
    for one in cut:
        table.add_row(
            str(one["ranks"]),
            one["method"],
            f"{one['counted_per_computed']:.2f}",
            f"{one['slowest_rank_to_mean']:.2f}",
            f"{one['busy']:.2f}",
            f"{one['largest_micro_batch']:,}",
            end_section=one["method"] == list(METHODS)[-1],
        )
    return table


if __name__ == "__main__":
    typer.run(main)
