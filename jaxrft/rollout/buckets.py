"""The few sizes that the native engine's programs are made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

from jaxrft.data.batching import halvings
from jaxrft.rollout.records import Request

SMALLEST_BUCKET = 16
# Reading fewer tokens hardly pays, and each length is programs of its own.
SMALLEST_CACHE = 64
# Keys that the decode kernel takes at a time, where they divide a cache.
KERNEL_BLOCK = 64
# Prompt tokens that are run together, padding included.
PREFILL_TOKENS = 8192
PROMPT_LENGTHS = 3
ROW_STEP = 8


def power_of_two(count: int) -> int:
    """Smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def cache_bucket(length: int, maximum: int) -> int:
    """Tokens of a cache that holds ``length``: the maximum, its half, a quarter or an eighth, rounded up to 16.

    Not below :data:`SMALLEST_CACHE`, if the maximum is not.
    """
    sizes = halvings(maximum, SMALLEST_BUCKET)
    return next(size for size in sizes if size >= max(length, min(SMALLEST_CACHE, sizes[-1])))


def whole_cache(maximum: int) -> int:
    """Tokens of a cache that a kernel reads as far as it is filled: the maximum, rounded up to the kernel's blocks."""
    return -(-maximum // KERNEL_BLOCK) * KERNEL_BLOCK


@dataclasses.dataclass(frozen=True)
class PromptShapes:
    """What prompts are padded to before they are run, and what their caches are padded to after.

    Those that are run together are of one of few shapes; what they leave is of one shape, so that one program puts
    prompts of all lengths into slots.

    Attributes:
        rows: prompts that are run together, ascending: all that may be, an eighth, ...
        lengths: tokens of each, ascending: the longest, a half, a quarter.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, prompts: int, longest: int, max_tokens: int) -> Self:
        """Those of a call of the engine.

        Args:
            prompts: that free slots can start, at most.
            longest: tokens that one has at most.
            max_tokens: run together, padding included, where there are several prompts.
        """
        lengths = halvings(longest, SMALLEST_BUCKET, PROMPT_LENGTHS)
        fitting = max(max_tokens // lengths[-1], 1)
        return cls(_eighths(min(power_of_two(prompts), power_of_two(fitting + 1) // 2)), lengths)

    @classmethod
    def for_requests(cls, requests: Sequence[Request], *, slots: int, longest: int | None, max_tokens: int) -> Self:
        """Those of some requests.

        Args:
            requests: at least one.
            slots: completions generated at the same time.
            longest: tokens that a prompt has at most; None, or where one of these has more: as the longest of them.
            max_tokens: as of :meth:`of`.
        """
        needed = max(len(request.prompt_ids) for request in requests)
        if longest is None or longest < needed:
            longest = power_of_two(needed)
        startable = -(-slots // min(request.n for request in requests))
        return cls.of(min(len(requests), startable), longest, max_tokens)

    def together(self, waiting: int) -> int:
        """Prompts to run next, of so many: no more than half of the rows are padding."""
        return min(waiting, max(rows for rows in self.rows if rows <= max(2 * waiting, 1)))

    def padded(self, prompts: int, length: int) -> tuple[int, int]:
        """Rows and tokens that so many prompts take, the longest of which has ``length`` tokens."""
        return next(n for n in self.rows if n >= prompts), next(n for n in self.lengths if n >= length)


def _eighths(most: int) -> tuple[int, ...]:
    sizes = {1}
    while most > 1:
        sizes.add(most)
        most //= ROW_STEP
    return tuple(sorted(sizes))
