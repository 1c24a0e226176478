"""Prepares the data of each optimizer step, in a background thread while earlier steps compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from lavin_ds.config import RunConfig
from lavin_ds.data.collate import Batch, collate
from lavin_ds.data.sampler import assign, global_batch_indices, total_steps
from lavin_ds.data.shards import ShardReader
from lavin_ds.parallel import data_parallel_rank, data_parallel_size

AHEAD = 2  # optimizer steps that may be prepared in advance
Item = TypeVar("Item")


@dataclass(frozen=True)
class StepData:
    """One rank's part of a global batch, and totals of the whole global batch."""

    step: int  # counted from 0
    batches: list[Batch]  # this rank's micro-batches; every rank has the same number
    tokens: list[int]  # of each micro-batch, without padding
    labelled: int  # labelled tokens of the global batch
    images: int  # of the global batch, at most one per sample
    rows: np.ndarray  # the samples of the global batch: [global_batch] indices into the split


class Feed:
    """Makes the micro-batches of this rank. They depend only on the step number."""

    def __init__(self, config: RunConfig, reader: ShardReader, device: torch.device):
        self.training, self.reader = config.training, reader
        self.visual_tokens = config.model.visual_tokens
        self.visual_input = reader.visual_input(config.model.vision_source)
        self.pin = device.type == "cuda"  # a copy to the GPU overlaps with computation only from pinned memory
        self.lengths = reader.lengths(self.visual_tokens)
        self.has_image = reader.has_pixels & (self.visual_tokens > 0)
        self.samples = reader.trainable
        self.total_steps = total_steps(len(self.samples), self.training.epochs, self.training.global_batch)

    def step(self, step: int) -> StepData:
        training = self.training
        chosen = global_batch_indices(len(self.samples), training.global_batch, training.seed, step)
        rows = self.samples[chosen]
        lengths, has_image = self.lengths[rows], self.has_image[rows]
        dealt = assign(rows, lengths, has_image, data_parallel_size(), training.micro_batch, training.packing)
        parts = dealt[data_parallel_rank()]
        return StepData(
            step=step,
            batches=[self.batch(part) for part in parts],
            tokens=[int(self.lengths[part].sum()) for part in parts],
            labelled=int(self.reader.label_counts[rows].sum()),
            images=int(has_image.sum()),
            rows=rows,
        )

    def batch(self, rows: np.ndarray) -> Batch:
        read = [self.reader.row(int(i)) for i in rows]
        batch = collate(read, self.visual_input, self.reader.frame, self.visual_tokens, self.training.packing)
        return batch.pin_memory() if self.pin else batch

    def steps(self, first: int) -> Iterator[StepData]:
        return (self.step(step) for step in range(first, self.total_steps))


@contextmanager
def in_background(items: Iterable[Item], ahead: int = AHEAD) -> Iterator[Iterator[Item]]:
    """Iterates over `items` in a thread, at most `ahead` items in advance. With `ahead` 0 there is no thread.

    One thread is enough: collating copies arrays, which takes less time than a step (benchmarks/prefetch.py). An
    exception in the thread is raised where the caller takes the next item. The thread ends with the context.
    """
    if ahead == 0:
        yield iter(items)
        return
    ready: queue.Queue = queue.Queue(ahead)
    ended = threading.Event()

    def put(message: tuple) -> None:
        while not ended.is_set():
            try:
                return ready.put(message, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put((item, None))
                if ended.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    def take() -> Iterator[Item]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=draw, name="feed", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        thread.join()
