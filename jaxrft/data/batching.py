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
