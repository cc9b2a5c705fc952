"""Which keys a query may see: for every mask that occurs, one run of keys without a gap.

Causal rows, rows packed with several segments, sliding windows, and slots of a cache all are of this kind, so that a
mask is two integers a query, and never an array of queries by keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Query i sees the keys ``first[i]`` to ``last[i]``.

    Along a row neither decreases: blocks of keys that a block of queries does not see stand before and behind the
    others, and are left out.

    Attributes:
        first, last: places of keys; one row where all rows have the same.
        lengths: valid tokens of right-padded rows; None: not known, or several segments a row.
        kernel: which implementation attends, of ``jaxrft.models.attention.KERNELS``.
        window: keys that a query sees at most; None: no sliding window, or one that differs from layer to layer.
        packed: whether a row may hold several segments.
    """

    first: Int[Array, "one_or_batch time"]
    last: Int[Array, "one_or_batch time"]
    lengths: Int[Array, "batch"] | None = None
    kernel: str = dataclasses.field(default="dense", metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def visible(self, keys: Int[Array, "keys"]) -> Bool[Array, "one_or_batch time keys"]:
        """Which of the keys at these places each query sees."""
        return (keys >= self.first[..., None]) & (keys <= self.last[..., None])


def causal_mask(
    length: int,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    lengths: Int[Array, "batch"] | None = None,
    kernel: str = "dense",
) -> AttentionMask:
    """Each token sees itself and what stands before it in its segment; with a window w, the last w of these.

    Args:
        length: tokens of a row.
        sliding_window: w; None: all are seen.
        segment_ids: equal for tokens that may see each other, which stand side by side.
        lengths: valid tokens of rows padded on the right. They need no mask: no valid token stands behind the padding.
        kernel: which implementation attends.
    """
    last = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.zeros_like(last) if segment_ids is None else segment_starts(segment_ids)
    if sliding_window is not None and sliding_window < length:
        first = jnp.maximum(first, last - sliding_window + 1)
    packed = segment_ids is not None
    lengths = None if packed else lengths
    return AttentionMask(first, jnp.broadcast_to(last, first.shape), lengths, kernel, sliding_window, packed)


def cache_mask(
    positions: Int[Array, "slots"], sliding_window: int | None = None, kernel: str = "dense"
) -> AttentionMask:
    """Which cached keys each slot's newest token, at ``positions``, may see: itself and what stands before it."""
    last = positions[:, None].astype(jnp.int32)
    first = jnp.zeros_like(last)
    if sliding_window is not None:
        first = jnp.maximum(first, last - sliding_window + 1)
    return AttentionMask(first, last, kernel=kernel, window=sliding_window)


def segment_starts(segment_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Place of the first token of each token's segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    new = jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1)], axis=1) != 0
    # Not jnp.maximum.accumulate, which takes a step of a loop for every token.
    return jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def segments(mask: AttentionMask, most: int) -> tuple[Any, Any, Any]:
    """The segments of causal rows, the padding behind them among these: every token is in one.

    Args:
        most: segments of a row that are looked for.

    Returns:
        Place of each segment's first token, Int[Array, "one_or_batch most"]; its tokens, likewise; -1 for both where
        a row has fewer. And Bool[Array, ""]: whether these are all. Where a row has more, the others are left out.
    """
    length = mask.first.shape[1]
    # A token that sees itself alone starts a segment. With a window of one token each is one, and sees what it should.
    number = jnp.cumsum(mask.first == mask.last, axis=1, dtype=jnp.int32)
    wanted = jnp.arange(1, most + 2, dtype=jnp.int32)
    starts = _search(number, wanted, "left")
    there = starts[:, :-1] < length
    return (
        jnp.where(there, starts[:, :-1], -1),
        jnp.where(there, jnp.diff(starts, axis=1), -1),
        jnp.all(number[:, -1] <= most),
    )


def blocks_of_keys(mask: AttentionMask, query_block: int, key_block: int) -> tuple[Any, Any]:
    """For each block of queries the blocks of keys that it sees: the first, and the one behind the last.

    Args:
        mask: over a multiple of ``query_block`` queries.

    Returns:
        Two of Int[Array, "one_or_batch query_blocks"].
    """
    return mask.first[:, ::query_block] // key_block, mask.last[:, query_block - 1 :: query_block] // key_block + 1


def blocks_of_queries(mask: AttentionMask, query_block: int, key_block: int, keys: int) -> tuple[Any, Any]:
    """For each block of keys the blocks of queries that see it, likewise.

    Args:
        keys: how many there are, a multiple of ``key_block``.

    Returns:
        Two of Int[Array, "one_or_batch key_blocks"].
    """
    start = jnp.arange(0, keys, key_block, dtype=jnp.int32)
    low = _search(mask.last, start, "left")
    high = _search(mask.first, start + key_block - 1, "right")
    return low // query_block, -(-high // query_block)


def whole_blocks_of_keys(mask: AttentionMask, query_block: int, key_block: int) -> Int[Array, "rows query_blocks 4"]:
    """For each block of queries the blocks of keys that it sees, and those of which each query sees every key.

    Returns:
        The first that is seen, the first that is seen whole, the one behind the last that is seen whole, and the one
        behind the last that is seen. The middle two are equal where none is seen whole.
    """
    low, high = blocks_of_keys(mask, query_block, key_block)
    # Of a block's queries the last sees the fewest keys on the left, and the first the fewest on the right.
    whole = -(-mask.first[:, query_block - 1 :: query_block] // key_block)
    rest = (mask.last[:, ::query_block] + 1) // key_block
    return _in_order(low, whole, rest, high)


def whole_blocks_of_queries(
    mask: AttentionMask, query_block: int, key_block: int, keys: int
) -> Int[Array, "rows key_blocks 4"]:
    """For each block of keys the blocks of queries that see it, and those of which each query sees every key of it."""
    low, high = blocks_of_queries(mask, query_block, key_block, keys)
    start = jnp.arange(0, keys, key_block, dtype=jnp.int32)
    whole = _search(mask.last, start + key_block - 1, "left")
    rest = _search(mask.first, start, "right")
    return _in_order(low, -(-whole // query_block), rest // query_block, high)


def _search(rows: Int[Array, "rows length"], values: Int[Array, "values"], side: str) -> Int[Array, "rows values"]:
    """Where each value would stand in each row, whose numbers do not decrease.

    All are compared: one kernel of a GPU, where halving the rows is a loop of small ones.
    """

    def search(row: Array) -> Array:
        return jnp.searchsorted(row, values, side=side, method="compare_all")

    return jax.vmap(search)(rows).astype(jnp.int32)


def _in_order(low: Any, whole: Any, rest: Any, high: Any) -> Any:
    whole = jnp.clip(whole, low, high)
    return jnp.stack([low, whole, jnp.clip(rest, whole, high), high], axis=-1)


def padded_mask(mask: AttentionMask, multiple: int) -> AttentionMask:
    """With further queries, which see what the last one sees, up to a multiple."""
    more = -mask.first.shape[1] % multiple
    first, last = (jnp.pad(a, ((0, 0), (0, more)), mode="edge") for a in (mask.first, mask.last))
    return dataclasses.replace(mask, first=first, last=last)
