import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lavin_ds.data.sampler import assign, epoch_order, global_batch_indices, micro_batches, total_steps
from lavin_ds.errors import UserError

sizes = st.integers(1, 60)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_fix():
    assert sorted(epoch_order(100, 3, 0)) == list(range(100))
    assert epoch_order(100, 3, 0).tolist() == epoch_order(100, 3, 0).tolist()
    assert epoch_order(100, 3, 0).tolist() != epoch_order(100, 3, 1).tolist()
    assert epoch_order(100, 3, 0).tolist() != epoch_order(100, 4, 0).tolist()


def test_the_order_does_not_change_between_versions():
    assert epoch_order(10, 0, 0).tolist() == [6, 8, 1, 7, 4, 5, 2, 3, 9, 0]


@given(n=sizes, batch=sizes, seed=st.integers(0, 5))
def test_the_steps_laid_end_to_end_are_the_epochs_laid_end_to_end(n, batch, seed):
    steps = 1 + 2 * n // batch
    stream = np.concatenate([global_batch_indices(n, batch, seed, step) for step in range(steps)])
    epochs = np.concatenate([epoch_order(n, seed, epoch) for epoch in range(1 + len(stream) // n)])
    assert stream.tolist() == epochs[: len(stream)].tolist()


def draw(batch: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, lengths and images of a global batch; some seeds draw all lengths alike, or an image everywhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 512, batch) if seed % 5 else np.full(batch, 100)
    return rng.permutation(batch) + 7, lengths, rng.random(batch) < rng.choice([0.5, 1.0])


@given(batch=sizes, ranks=st.integers(1, 8), micro=st.integers(1, 8), seed=st.integers(0, 1000), packing=st.booleans())
def test_a_step_is_computed_once_on_any_number_of_ranks_within_the_memory_of_micro_batch(
    batch, ranks, micro, seed, packing
):
    indices, lengths, has_image = draw(batch, seed)
    try:
        count = micro_batches(batch, ranks, micro)
    except UserError:
        assume(False)
    dealt = assign(indices, lengths, has_image, ranks, micro, packing)
    pieces = [piece for rank in dealt for piece in rank]
    assert sorted(np.concatenate(pieces)) == sorted(indices)
    assert [len(rank) for rank in dealt] == [count] * ranks
    place = {index: position for position, index in enumerate(indices)}
    for piece in pieces:
        positions = [place[index] for index in piece]
        longest = lengths[positions].sum() if packing else len(piece) * lengths[positions].max()
        assert len(piece) >= 1 and longest <= micro * lengths.max()
        assert has_image[positions].sum() <= micro


@given(ranks=st.integers(1, 4), micro=st.integers(1, 6), accumulation=st.integers(1, 6), seed=st.integers(0, 1000))
def test_padded_pieces_do_not_overlap_in_length_and_the_most_work_comes_first(ranks, micro, accumulation, seed):
    batch = ranks * micro * accumulation
    _, lengths, has_image = draw(batch, seed)
    dealt = assign(np.arange(batch), lengths, has_image, ranks, micro)
    pieces = sorted((lengths[piece].min(), lengths[piece].max()) for rank in dealt for piece in rank)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(pieces))
    work = [[len(piece) * lengths[piece].max() for piece in rank] for rank in dealt]
    for k in range(accumulation - 1):
        assert min(rank[k] for rank in work) >= max(rank[k + 1] for rank in work)


@given(ranks=st.integers(1, 4), micro=st.integers(1, 4), seed=st.integers(0, 1000))
def test_no_other_cut_at_the_same_places_has_a_smaller_largest_piece(ranks, micro, seed):
    """Against trying every way to cut the samples where they stand, sorted."""
    batch = 7
    assume(batch >= ranks * math.ceil(batch / (ranks * micro)))
    count = ranks * micro_batches(batch, ranks, micro)
    _, lengths, _ = draw(batch, seed)
    ordered = sorted(lengths, reverse=True)
    smallest = min(
        max((end - start) * ordered[start] for start, end in itertools.pairwise((0, *ends, batch)))
        for ends in itertools.combinations(range(1, batch), count - 1)
    )
    dealt = assign(np.arange(batch), lengths, np.zeros(batch, bool), ranks, micro)
    assert max(len(piece) * lengths[piece].max() for rank in dealt for piece in rank) == smallest


@pytest.mark.parametrize(
    ("ranks", "packing", "busy"),
    [(1, False, 0.92), (2, False, 0.88), (8, False, 0.78), (1, True, 1.0), (8, True, 0.97)],
)
def test_little_is_computed_or_waited_for_in_vain(ranks, packing, busy):
    rng = np.random.default_rng(0)
    counted, took = 0, 0
    for _ in range(50):
        lengths = rng.gamma(4, 60, 32).clip(40, 511).astype(int)
        dealt = assign(np.arange(32), lengths, rng.random(32) < 0.5, ranks, 4, packing)
        cost = [[lengths[p].sum() if packing else len(p) * lengths[p].max() for p in rank] for rank in dealt]
        counted += lengths.sum()
        took += ranks * np.max(cost, axis=0).sum()  # every rank waits for the slowest at every micro-batch
    assert counted / took >= busy


@pytest.mark.parametrize("packing", [False, True])
def test_equal_lengths_are_dealt_in_the_order_given(packing):
    dealt = assign(np.array([5, 3, 9, 1]), np.full(4, 10), np.zeros(4, bool), 2, 1, packing)
    assert [[piece.tolist() for piece in rank] for rank in dealt] == [[[5], [9]], [[3], [1]]]


@pytest.mark.parametrize(("batch", "ranks", "micro"), [(1, 2, 4), (3, 2, 1), (7, 8, 4)])
def test_a_batch_that_leaves_a_rank_idle_is_refused(batch, ranks, micro):
    with pytest.raises(UserError, match=f"global_batch {batch} .*multiple of {ranks}"):
        assign(np.arange(batch), np.ones(batch, int), np.zeros(batch, bool), ranks, micro)


def test_steps_are_whole_batches_and_at_least_one():
    assert total_steps(12726, 20, 32) == 7953
    assert total_steps(100, 0.5, 32) == 1
    assert total_steps(3, 1, 32) == 1


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no sample to train on"):
        global_batch_indices(0, 32, 0, 0)
