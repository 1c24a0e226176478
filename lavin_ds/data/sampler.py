"""Which samples an optimizer step sees, and which rank computes which of them. Pure functions of numbers.

The samples form an endless stream: one permutation per epoch, each a function of (seed, epoch). Optimizer step k takes
samples [k * N, (k + 1) * N) of the stream, where N is the global batch. So a step sees the same samples on any number
of ranks, and the step number is the only position to save.

Dimensions: n samples in the data, N samples in a global batch.
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
    # numpy may change how it shuffles. Sorting raw generator output does not depend on that.
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(b"order"), epoch])).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def global_batch_indices(n: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """The samples of optimizer step `step`, counted from 0; int64 [N].

    A batch that reaches the end of an epoch continues with the next epoch, so it may hold a sample twice.
    """
    if n < 1:
        raise UserError("The split has no sample to train on: prepare more data or a larger data.max_length.")
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs = positions // n
    parts = [epoch_order(n, seed, int(epoch))[positions[epochs == epoch] % n] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def micro_batches(global_batch: int, ranks: int, micro_batch: int) -> int:
    """The number of micro-batches that every rank computes per optimizer step.

    Raises:
        UserError: there are too few samples to give every rank that many without an empty one.
    """
    count = math.ceil(global_batch / (ranks * micro_batch))
    if global_batch < ranks * count:
        raise UserError(
            f"training.global_batch {global_batch} cannot be split over {ranks} data-parallel ranks so that each has "
            f"the same number of micro-batches of at most training.micro_batch {micro_batch} samples: make it a "
            f"multiple of {ranks}, or use fewer ranks."
        )
    return count


def assign(
    indices: np.ndarray,
    lengths: np.ndarray,
    has_image: np.ndarray,
    ranks: int,
    micro_batch: int,
    packing: bool = False,
) -> list[list[np.ndarray]]:
    """Splits a global batch into micro-batches of nearly equal work; element [rank][k] holds sample indices.

    indices [N]: the samples; lengths [N]: their lengths in tokens; has_image [N]: whether they have an image. Every
    rank gets `micro_batches(...)` micro-batches. Each has at least one sample: a few long ones or many short ones.
    `micro_batch` bounds the memory of each: it has at most as many tokens, with padding, as `micro_batch` samples of
    the batch's greatest length, and at most `micro_batch` images.

    A padded micro-batch holds samples of similar lengths. A packed one (`packing`) has no padding, so its samples may
    have any lengths. Micro-batches with the most work come first, so that a run that does not fit into memory fails at
    once. At the same k all ranks have about the same work, and the rank with the least work so far gets the largest
    micro-batch. Ties are broken by the position in `indices` and by the rank.
    """
    lengths, has_image = np.asarray(lengths).tolist(), np.asarray(has_image).tolist()
    pieces = ranks * micro_batches(len(indices), ranks, micro_batch)
    longest_first = sorted(range(len(indices)), key=lambda i: -lengths[i])
    if packing:
        cut = _fill_evenly(longest_first, lengths, has_image, pieces, micro_batch)
        cost = [sum(lengths[i] for i in piece) for piece in cut]
    else:
        cut = _cut_evenly(longest_first, lengths, has_image, pieces, micro_batch)
        cost = [len(piece) * lengths[piece[0]] for piece in cut]
    dearest_first = sorted(range(pieces), key=lambda p: -cost[p])
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for start in range(0, pieces, ranks):
        least_busy_first = sorted(range(ranks), key=work.__getitem__)
        for rank, p in zip(least_busy_first, dearest_first[start : start + ranks], strict=True):
            dealt[rank].append(np.asarray(indices)[cut[p]])
            work[rank] += cost[p]
    return dealt


def _cut_evenly(order: list[int], lengths: list[int], has_image: list[bool], count: int, most: int) -> list[list[int]]:
    """Cuts `order` into `count` consecutive pieces so that the largest has as few tokens as possible, with padding.

    A binary search finds the smallest limit on a piece's tokens that needs at most `count` pieces. A limit of `most`
    samples of the greatest length is always enough, because a full piece then has at least `most` samples.
    """
    low, high = lengths[order[0]], most * lengths[order[0]]
    while low < high:
        limit = (low + high) // 2
        if len(_cut(order, lengths, has_image, limit, most)) <= count:
            high = limit
        else:
            low = limit + 1
    cut = _cut(order, lengths, has_image, low, most)
    while len(cut) < count:  # with many equal lengths there are too few pieces: halve the largest
        largest = max((p for p in range(len(cut)) if len(cut[p]) > 1), key=lambda p: len(cut[p]) * lengths[cut[p][0]])
        piece = cut[largest]
        cut[largest : largest + 1] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    return cut


def _cut(order: list[int], lengths: list[int], has_image: list[bool], limit: int, most_images: int) -> list[list[int]]:
    """Consecutive pieces of `order`, each as large as the limits on tokens (padding included) and images allow."""
    cut: list[list[int]] = []
    images = 0
    for i in order:
        images += has_image[i]
        if cut and (len(cut[-1]) + 1) * lengths[cut[-1][0]] <= limit and images <= most_images:
            cut[-1].append(i)
        else:
            cut.append([i])
            images = int(has_image[i])
    return cut


def _fill_evenly(order: list[int], lengths: list[int], has_image: list[bool], count: int, most: int) -> list[list[int]]:
    """`count` pieces with about the same sum of lengths: each sample goes to the piece with the fewest tokens so far.

    No piece has more tokens than `most` samples of the greatest length: as long as a sample is left, some piece has
    fewer than `most` samples, so it has room.
    """
    filled: list[list[int]] = [[] for _ in range(count)]
    tokens, images = [0] * count, [0] * count
    for i in order:
        open_to_it = [p for p in range(count) if not has_image[i] or images[p] < most]
        emptiest = min(open_to_it, key=tokens.__getitem__)
        filled[emptiest].append(i)
        tokens[emptiest] += lengths[i]
        images[emptiest] += has_image[i]
    return filled
