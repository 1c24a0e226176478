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


@given(batch=sizes, ranks=st.integers(1, 8), micro=st.integers(1, 8), seed=st.integers(0, 1000))
def test_every_sample_of_a_step_is_computed_once_on_any_number_of_ranks(batch, ranks, micro, seed):
    lengths = np.random.default_rng(seed).integers(1, 512, batch)
    indices = np.random.default_rng(seed + 1).permutation(batch) + 7
    try:
        count = micro_batches(batch, ranks, micro)
    except UserError:
        assume(False)
    dealt = assign(indices, lengths, ranks, micro)
    pieces = [piece for rank in dealt for piece in rank]
    assert sorted(np.concatenate(pieces)) == sorted(indices)
    assert [len(rank) for rank in dealt] == [count] * ranks
    counts = [len(piece) for piece in pieces]
    assert min(counts) >= 1 and max(counts) <= micro and max(counts) - min(counts) <= 1


@given(
    ranks=st.integers(1, 4),
    micro=st.integers(1, 6),
    accumulation=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_lengths_do_not_overlap_between_pieces_and_the_longest_come_first(ranks, micro, accumulation, seed):
    batch = ranks * micro * accumulation
    lengths = np.random.default_rng(seed).integers(1, 512, batch)
    dealt = assign(np.arange(batch), lengths, ranks, micro)
    for k in range(accumulation - 1):
        shortest_now = min(lengths[rank[k]].min() for rank in dealt)
        longest_next = max(lengths[rank[k + 1]].max() for rank in dealt)
        assert shortest_now >= longest_next


def test_ranks_have_nearly_the_same_work_and_little_padding():
    rng = np.random.default_rng(0)
    computed, counted, work = 0, 0, np.zeros(2)
    for _ in range(100):
        lengths = rng.gamma(4, 60, 32).clip(40, 511).astype(int)
        for rank, pieces in enumerate(assign(np.arange(32), lengths, 2, 4)):
            for piece in pieces:
                work[rank] += lengths[piece].max() * len(piece)
                counted += lengths[piece].sum()
        computed = work.sum()
    assert counted / computed > 0.88
    assert work.max() / work.mean() < 1.03


def test_equal_lengths_are_dealt_in_the_order_given():
    dealt = assign(np.array([5, 3, 9, 1]), np.full(4, 10), 2, 1)
    assert [[piece.tolist() for piece in rank] for rank in dealt] == [[[5], [9]], [[3], [1]]]


@pytest.mark.parametrize(("batch", "ranks", "micro"), [(1, 2, 4), (3, 2, 1), (7, 8, 4)])
def test_a_batch_that_leaves_a_rank_idle_is_refused(batch, ranks, micro):
    with pytest.raises(UserError, match=f"global_batch {batch} .*multiple of {ranks}"):
        assign(np.arange(batch), np.ones(batch), ranks, micro)


def test_steps_are_whole_batches_and_at_least_one():
    assert total_steps(12726, 20, 32) == 7953
    assert total_steps(100, 0.5, 32) == 1
    assert total_steps(3, 1, 32) == 1


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no sample to train on"):
        global_batch_indices(0, 32, 0, 0)
