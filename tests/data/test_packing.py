"""Packing: every sample once, no row too full, few rows, like loads."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.data.packing import pack

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=60)


@given(lengths=LENGTHS, spare=st.integers(0, 30), blocks=st.integers(1, 4), each=st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_every_sample_is_in_one_row_that_has_room(lengths, spare, blocks, each):
    capacity, multiple = max(lengths) + spare, blocks * each
    rows = pack(lengths, capacity, multiple, blocks)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= capacity
    assert len(rows) % multiple == 0
    assert rows == pack(lengths, capacity, multiple, blocks)
    # First-fit decreasing's bound, with the least number of rows that the tokens alone need.
    fewest = -(-sum(lengths) // capacity)
    assert len(rows) - multiple < max(11 / 9 * fewest + 6 / 9, 2 * fewest)
    # Micro-batches hold rows of like loads, and so do the blocks of each.
    parts = [sorted(loads[start : start + multiple]) for start in range(0, len(rows), multiple)]
    assert all(heavy[0] >= light[-1] for heavy, light in itertools.pairwise(parts))
    for start in range(0, len(rows), multiple):
        shares = [sum(loads[at : at + each]) for at in range(start, start + multiple, each)]
        assert max(shares) - min(shares) <= max(loads[start : start + multiple]) - min(loads[start : start + multiple])


def test_samples_are_spread_over_all_rows():
    """Not heaped into the first ones, where a micro-batch has more rows than are needed."""
    rows = pack([7, 1, 3, 5, 2, 6, 4, 8], capacity=40, multiple=4, blocks=2)
    assert [sum([7, 1, 3, 5, 2, 6, 4, 8][i] for i in row) for row in rows] == [9, 9, 9, 9]
    assert pack([5], 8, 2) == [[0], []]
    assert pack([10, 9, 2, 1], 10, 4, 2) == [[0], [3], [1], [2]], "11 tokens for each block"


def test_where_samples_cannot_be_spread_they_stand_as_they_first_fit():
    """Longest into the emptiest row first: 5, 5 | 4 | 4, then no row has room for the last 4."""
    lengths = [6, 5, 4, 3, 2]
    assert sorted(map(sorted, pack(lengths, 10))) == [[0, 2], [1, 3, 4]]
    lengths = [3, 3, 2, 2, 2]
    assert sorted(map(sorted, pack(lengths, 6))) == [[0, 1], [2, 3, 4]]


def test_what_is_refused():
    with pytest.raises(ValueError, match="got a sample of 9 tokens for rows of 8"):
        pack([1, 9], 8)
    with pytest.raises(ValueError, match="blocks: got 2"):
        pack([1], 8, 3, 2)
