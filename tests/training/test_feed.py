"""Data drawn in the background is the same data, and its troubles arrive as themselves."""

from __future__ import annotations

import threading
import time

import pytest

from lavin_ds.errors import UserError
from lavin_ds.training.feed import in_background


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_items_come_in_their_order_and_end(ahead):
    with in_background(iter(range(20)), ahead) as items:
        assert list(items) == list(range(20))


def test_the_next_items_are_drawn_while_the_last_one_is_used():
    drawn = []

    def draw():
        for number in range(10):
            drawn.append(number)
            yield number

    with in_background(draw(), ahead=2) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(drawn) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        # One is used, two wait, one more is in the thread's hands; no more than that is held.
        time.sleep(0.05)
        assert drawn == [0, 1, 2, 3]


def test_what_goes_wrong_in_the_background_reaches_the_caller_as_itself():
    def draw():
        yield 1
        raise UserError("Shard x is damaged.")

    with in_background(draw()) as items:
        assert next(items) == 1
        with pytest.raises(UserError, match="Shard x is damaged") as caught:
            next(items)
    assert any(entry.name == "draw" for entry in caught.traceback)  # where it happened, not only where it surfaced


@pytest.mark.parametrize("taken", [0, 1])
def test_leaving_early_ends_the_thread(taken):
    before = threading.active_count()
    with in_background(iter(range(1000)), ahead=1) as items:
        for _ in range(taken):
            next(items)
    assert threading.active_count() == before
