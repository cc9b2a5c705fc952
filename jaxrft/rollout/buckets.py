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
# Of a prompt, in the blocks that the shortest is padded to.
PROMPT_BLOCKS = (1, 2, 4)
# Prompts that are put into slots together are padded to all that there may be, or to one of so many parts of that.
FEW = 8


def power_of_two(count: int) -> int:
    """Smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


def slots_for(completions: int, most: int, devices: int = 1) -> int:
    """Completions that are generated at once: a power of two, or as many as may be, in equal shares for the devices.

    Slots that the devices do not divide would all be on each of them. So there are a few more or fewer, but not more
    than may be, if each device can have one.

    Args:
        completions: in all.
        most: that may be.
        devices: which share them out.
    """
    fitting = max(most // devices, 1) * devices
    return min(-(-power_of_two(completions) // devices) * devices, fitting)


def startable(prompts: int, n: int, slots: int) -> int:
    """Prompts of ``n`` completions each that free slots can start, at most."""
    return min(prompts, -(-slots // n))


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
    """How many prompts are run together, a power of two, and what they are padded to: one of three lengths.

    What they leave is cut into blocks, and padded to one of two numbers of these, so that one program puts prompts of
    all lengths into slots, and another one those few that waited for them.

    Attributes:
        rows: prompts that are run together at most.
        blocks: of ``block`` tokens that are run together at most, a power of two, as devices share them out.
        block: tokens that the shortest are padded to; others take two blocks, or four.
    """

    rows: int
    blocks: int
    block: int

    @classmethod
    def of(cls, prompts: int, longest: int, max_tokens: int) -> Self:
        """Those of a call of the engine.

        Args:
            prompts: that free slots can start, at most.
            longest: tokens that one has at most.
            max_tokens: run together, padding included; or those of the longest prompt, where these are more.
        """
        block = halvings(longest, SMALLEST_BUCKET, len(PROMPT_BLOCKS))[0]
        fitting = _power_below(max(max_tokens // block, 1))
        rows = min(power_of_two(prompts), fitting)
        most = next(n for n in PROMPT_BLOCKS if n * block >= longest)
        return cls(rows, max(min(fitting, rows * most), most), block)

    @classmethod
    def for_requests(
        cls, requests: Sequence[Request], *, slots: int, longest: int | None, max_length: int, max_tokens: int
    ) -> Self:
        """Those of some requests.

        Args:
            requests: at least one.
            slots: completions generated at the same time.
            longest: tokens that a prompt has at most; None, or where one of these has more: the power of two above the
                longest of them.
            max_length: tokens of prompt and completion together at most.
            max_tokens: as of :meth:`of`.
        """
        needed = max(len(request.prompt_ids) for request in requests)
        if longest is None or longest < needed:
            longest = power_of_two(needed)
        prompts = startable(len(requests), min(request.n for request in requests), slots)
        return cls.of(prompts, min(longest, max_length), max_tokens)

    def each(self, length: int) -> int:
        """Blocks that a prompt of ``length`` tokens takes."""
        return next(n for n in PROMPT_BLOCKS if n * self.block >= length)

    def most(self, length: int) -> int:
        """Prompts that are run together at most, where the longest of them has ``length`` tokens."""
        return min(self.rows, self.blocks // self.each(length))

    def padded(self, prompts: int, length: int) -> tuple[int, int]:
        """Rows and tokens that so many prompts take, the longest of which has ``length`` tokens."""
        return power_of_two(prompts), self.each(length) * self.block

    def kept(self, rows: int, each: int) -> tuple[int, int]:
        """Rows and blocks that ``rows`` prompts of ``each`` blocks are padded to, so that they are of few shapes.

        They are all that there may be, or an eighth of that where it does: one that waited for a slot is not copied as
        if it were many.
        """
        few = self.rows // FEW, max(self.blocks // FEW, PROMPT_BLOCKS[-1])
        fits = rows <= few[0] and rows * each <= few[1]
        return few if fits else (self.rows, self.blocks)


def _power_below(count: int) -> int:
    return 1 << (count.bit_length() - 1)
