"""Which samples an optimizer step sees, and which rank computes which of them. Pure functions of numbers.

The order of samples is an infinite stream: one permutation an epoch, each a function of (seed, epoch) alone,
laid end to end. Optimizer step k takes samples [k * N, (k + 1) * N) of it, N being the global batch. So a
step sees the same samples on any number of ranks, and the position to save is the step number.

    n samples in the data, N samples in a global batch
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import numpy as np

from lavin_ds.errors import UserError


def total_steps(n_samples: int, epochs: float, global_batch: int) -> int:
    """Optimizer steps of a run: whole global batches in `epochs` passes over the data, at least one."""
    return max(1, math.floor(n_samples * epochs / global_batch))


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], read-only."""
    # Sorting raw generator output keeps the order when numpy changes how it shuffles.
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(b"order"), epoch])).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def global_batch_indices(n: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """The samples of optimizer step `step`, counted from 0; int64 [N].

    A batch on the seam of two epochs takes from both, and may then hold a sample twice.
    """
    if n < 1:
        raise UserError("The split has no sample to train on: prepare more data or a larger data.max_length.")
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs = positions // n
    parts = [epoch_order(n, seed, int(epoch))[positions[epochs == epoch] % n] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def micro_batches(global_batch: int, ranks: int, micro_batch: int) -> int:
    """How many micro-batches every rank computes for one optimizer step.

    Raises:
        UserError: samples cannot be dealt so that every rank has that many and none is empty.
    """
    count = math.ceil(global_batch / (ranks * micro_batch))
    if global_batch < ranks * count:
        raise UserError(
            f"training.global_batch {global_batch} cannot be dealt to {ranks} data-parallel ranks in equally "
            f"many micro-batches of at most training.micro_batch {micro_batch}: make it a multiple of "
            f"{ranks}, or use fewer ranks."
        )
    return count


def assign(indices: np.ndarray, lengths: np.ndarray, ranks: int, micro_batch: int) -> list[list[np.ndarray]]:
    """Deals a global batch to ranks as micro-batches; element [rank][k] holds sample indices.

    indices [N] are samples, lengths [N] their lengths in tokens. Every rank gets `micro_batches(...)` of
    them, whose sizes differ by at most one. Samples are sorted by length and cut where they stand, which
    leaves the least padding. The longest come first, so that a run that will not fit into memory fails at
    once. At the same k all ranks have neighbouring lengths, the longest for the rank with the least work so
    far. Ties are broken by the position in `indices` and by the rank.
    """
    per_rank = micro_batches(len(indices), ranks, micro_batch)
    order = np.argsort(-np.asarray(lengths), kind="stable")
    pieces = _cut(order, per_rank * ranks)
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    work = [0] * ranks  # tokens computed, padding included
    for k in range(per_rank):
        least_busy_first = sorted(range(ranks), key=work.__getitem__)
        for rank, piece in zip(least_busy_first, pieces[k * ranks : (k + 1) * ranks], strict=True):
            dealt[rank].append(np.asarray(indices)[piece])
            work[rank] += len(piece) * int(lengths[piece[0]])
    return dealt


def _cut(order: np.ndarray, count: int) -> list[np.ndarray]:
    """Consecutive pieces, the larger ones at the short end."""
    small, larger = divmod(len(order), count)
    sizes = [small] * (count - larger) + [small + 1] * larger
    return np.split(order, np.cumsum(sizes)[:-1])
