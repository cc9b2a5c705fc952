"""Samples of different lengths in rows of one length, with few empty places."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1, blocks: int = 1) -> list[list[int]]:
    """Which samples each row holds.

    As many rows as first-fit decreasing finds, rounded up to a multiple: of all heuristics as simple, none needs
    fewer (at most 11/9 of the least possible, and 6/9 of a row). The same samples are then spread over all of
    these rows, so that their loads, in tokens, are alike.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.
        multiple: rows of a micro-batch. Each ``multiple`` rows of the result are one, of rows with like loads.
        blocks: devices that share a micro-batch, each a contiguous block of its rows; divides ``multiple``. The
            blocks of a micro-batch carry like loads.

    Returns:
        Indices of the samples of each row, in rising order; each sample is in one row. The same for the same input.

    Raises:
        ValueError: a sample is longer than a row, or ``blocks`` does not divide ``multiple``.
    """
    if multiple % blocks:
        raise ValueError(f"blocks: got {blocks}, takes a divisor of the {multiple} rows of a micro-batch")
    if max(lengths, default=0) > capacity:
        raise ValueError(f"lengths: got a sample of {max(lengths)} tokens for rows of {capacity}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = _first_fit(lengths, order, capacity)
    rows += [[] for _ in range(-len(rows) % multiple)]
    rows = _balanced(lengths, order, capacity, len(rows)) or rows

    def load(row: Sequence[int]) -> int:
        return sum(lengths[i] for i in row)

    rows = sorted((sorted(row) for row in rows), key=lambda row: (-load(row), row))
    parts = (rows[start : start + multiple] for start in range(0, len(rows), multiple))
    return [row for part in parts for row in _dealt(part, blocks)]


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Each sample goes into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in order:
        length = lengths[sample]
        place = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(sample)
        room[place] -= length
    return rows


def _balanced(lengths: Sequence[int], order: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Each sample goes into the row of least load, which has most room; None where even that has too little."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for sample in order:
        load, row = loads[0]
        if load + lengths[sample] > capacity:
            return None
        rows[row].append(sample)
        heapq.heapreplace(loads, (load + lengths[sample], row))
    return rows


def _dealt(rows: Sequence[list[int]], blocks: int) -> list[list[int]]:
    """Rows of falling load dealt to and fro over the blocks: who was served last is the next to be served."""
    dealt: list[list[list[int]]] = [[] for _ in range(blocks)]
    for number, row in enumerate(rows):
        turn, place = divmod(number, blocks)
        dealt[place if turn % 2 == 0 else blocks - 1 - place].append(row)
    return [row for block in dealt for row in block]
