"""Few lengths for few compiled programs."""

from __future__ import annotations


def bucket_length(length: int, minimum: int = 16) -> int:
    """Smallest bucket that holds ``length`` tokens.

    Buckets are the powers of two and the midpoints between them (16, 24, 32, 48, 64, 96, ...), so at
    most a third of a batch's width is padding, and a program is compiled twice per doubling.

    Args:
        length: tokens that must fit, at least 0.
        minimum: tokens that every bucket holds.
    """
    wanted = max(length, minimum, 1)
    power = 1 << (wanted - 1).bit_length()
    midpoint = power // 4 * 3
    return midpoint if midpoint >= wanted else power


def halvings(longest: int, multiple: int = 8, count: int = 4) -> tuple[int, ...]:
    """Lengths that a run's programs are made for: the longest that may occur, its half, a quarter, ..., ascending.

    A run whose lengths differ from rollout to rollout compiles ``count`` programs at most, and which of them a batch
    takes depends on nothing but the batch.

    Args:
        longest: of the run.
        multiple: of which each is one; rounded up.
        count: of lengths, at most.
    """
    sizes = [-(-longest // 2**step) for step in range(count)]
    return tuple(sorted({size + -size % multiple for size in sizes}))
