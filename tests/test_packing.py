"""Best fit decreasing."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensloth.data.plan.packing import best_fit

CAPACITY = 64
row_lengths = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(row_lengths)
def test_each_row_is_in_exactly_one_pack_that_is_not_overfull(lengths):
    packs = best_fit(lengths, CAPACITY)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in pack) <= CAPACITY for pack in packs)


@given(row_lengths)
def test_at_most_one_pack_is_half_full_or_less(lengths):
    filled = [sum(lengths[row] for row in pack) for pack in best_fit(lengths, CAPACITY)]
    assert sum(tokens * 2 <= CAPACITY for tokens in filled) <= 1


@given(row_lengths)
def test_each_row_goes_where_the_least_room_is_left(lengths):
    """Against the textbook's slow way of saying it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(CAPACITY - length)
    left = [CAPACITY - sum(lengths[row] for row in pack) for pack in best_fit(lengths, CAPACITY)]
    assert sorted(left) == sorted(rooms)


def test_a_known_case_is_packed_as_on_paper():
    assert best_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]


def test_no_rows_make_no_packs():
    assert best_fit([], 10) == []


@pytest.mark.parametrize("lengths", [[11], [0], [5, -1]])
def test_a_row_that_cannot_be_in_a_pack_is_an_error(lengths):
    with pytest.raises(ValueError, match="between 1 and the pack's 10 tokens"):
        best_fit(lengths, 10)


def test_a_hundred_thousand_rows_are_packed_tightly_in_half_a_second():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.6, 100_000).astype(int), 1, 2048)
    start = time.process_time()
    packs = best_fit(lengths, 2048)
    assert time.process_time() - start < 0.5
    assert lengths.sum() / (len(packs) * 2048) > 0.99
