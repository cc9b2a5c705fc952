"""Attention of each slot's newest token to its cache, as a Pallas kernel that Triton compiles.

A cache is as long as the longest slot needs; of a shorter slot's only what it has is read. The kernel may also put the
newest token's key and value there. The keys of a slot are split over several instances where caches are long (as in
Flash-Decoding), so that few slots keep a GPU busy too, and what these find is joined after them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_backend
from jaxtyping import Array, Float

from jaxrft.models.attention.dense import MASKED_SCORE
from jaxrft.models.attention.mask import AttentionMask
from jaxrft.models.attention.triton import call
from jaxrft.models.attention.triton_kernels import product, scores_of, where_seen

# A tensor core's smallest block of rows.
SMALLEST_ROWS = 16
# Of an H100 or H200.
MULTIPROCESSORS = 132
# Instances that are on a multiprocessor at a time: each has three blocks of keys and values in shared memory.
RESIDENT_LARGE, RESIDENT_SMALL = 2, 4
# Places of a cache from which several instances share a slot's keys. What they find is joined by kernels of their own:
# with 384 places one instance was the faster (see docs/performance.md); longer caches have not been measured.
SPLIT_FROM = 512
SMALLEST_SPLIT = 128


class DecodeTile(NamedTuple):
    """How the kernel is cut.

    Attributes:
        step: keys that an instance takes at a time: a power of two of at least 16.
        warps: of an instance.
        stages: blocks of keys and values that are on their way or in use at a time.
    """

    step: int
    warps: int
    stages: int


def usual_splits(heads: int, keys: int) -> int:
    """Instances that share the keys of one of so many key heads of all slots: as many as are on a GPU at a time."""
    if keys < SPLIT_FROM:
        return 1
    return min(max(RESIDENT_SMALL * MULTIPROCESSORS // heads, 1), keys // SMALLEST_SPLIT)


def usual_tile(instances: int, head_dim: int) -> DecodeTile:
    """Small steps where there are more instances than fit on a GPU with large ones.

    By measurements on an H200 with heads of 128 channels, and of 64 for many instances; others go by these.
    """
    if instances <= RESIDENT_LARGE * MULTIPROCESSORS:
        return DecodeTile(64, 4, 3)
    return DecodeTile(32, 2 if head_dim <= 64 else 4, 3)


def attend_triton_decode(
    query: Float[Array, "slots 1 heads head_dim"],
    key: Float[Array, "slots kv_heads keys head_dim"],
    value: Float[Array, "slots kv_heads keys head_dim"],
    mask: AttentionMask,
    splits: int | None = None,
    tile: DecodeTile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "slots 1 heads head_dim"]:
    """Grouped-query attention of one query a slot; not differentiable.

    Args:
        key: a multiple of 16 of them.
        splits: instances that share the keys of a slot; None: the usual number.
        tile: None: the usual one; of fewer keys at a time where they are no multiple of its step.
        interpret: run the kernel without Triton; None: where there is no GPU.

    Raises:
        ValueError: the number of keys is not a multiple of 16, or the tile's no power of two.
    """
    return _attend(query, (), (key, value), mask, splits, tile, interpret)[0]


def extend_triton_decode(
    query: Float[Array, "slots 1 heads head_dim"],
    new: tuple[Float[Array, "slots kv_heads 1 head_dim"], Float[Array, "slots kv_heads 1 head_dim"]],
    cache: tuple[Float[Array, "slots kv_heads keys head_dim"], Float[Array, "slots kv_heads keys head_dim"]],
    mask: AttentionMask,
    splits: int | None = None,
    tile: DecodeTile | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "slots 1 heads head_dim"], tuple[Array, Array]]:
    """Attention of the newest token, whose key and value go into the cache, and the cache with them.

    Args:
        new: the token's key and value.
        cache: keys and values before it; changed in place where nobody else has them.
        mask: whose ``last`` is the place of the newest token.
        splits, tile, interpret: as above.

    Raises:
        ValueError: the number of keys is not a multiple of 16, or the tile's no power of two.
    """
    out, *cache = _attend(query, new, cache, mask, splits, tile, interpret)
    return out, (cache[0], cache[1])


def _attend(query, new, cache, mask, splits, tile, interpret):
    """The result, and where there is a new key and value the cache with them."""
    slots, _, heads, head_dim = query.shape
    kv_heads, keys = cache[0].shape[1], cache[0].shape[2]
    splits = usual_splits(slots * kv_heads, keys) if splits is None else splits
    tile = tile or usual_tile(slots * kv_heads * splits, head_dim)
    if tile.step & (tile.step - 1):
        raise ValueError(f"tile: got a step of {tile.step} keys, takes a power of two")
    tile = tile._replace(step=math.gcd(keys, tile.step))
    if tile.step < SMALLEST_ROWS:
        raise ValueError(f"key: got {keys} cached tokens, takes a multiple of {SMALLEST_ROWS}")
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    # Side by side: what makes them is one kernel then, in place of three.
    packed = jnp.concatenate([query[:, 0], *(part[:, :, 0] for part in new)], axis=1)
    places = tuple(jnp.broadcast_to(a[:, 0], (slots,)) for a in (mask.first, mask.last))
    found = _run(packed, heads, cache, places, tile, splits, interpret)
    parts, cache = found[: len(found) - len(new)], found[len(found) - len(new) :]
    out = parts[0] if splits == 1 else _joined(parts, heads // kv_heads).astype(query.dtype)
    return out.reshape(query.shape), *cache


def _joined(found, group):
    """The result of all keys, from what each split found."""
    total, peak, norm = found
    total, peak, norm = total[..., :group, :], peak[..., :group], norm[..., :group]
    weights = jnp.exp2(peak - jnp.max(peak, axis=2, keepdims=True))
    return jnp.sum(total * weights[..., None], axis=2) / jnp.sum(norm * weights, axis=2)[..., None]


def _run(packed, heads, cache, places, tile, splits, interpret):
    """The result itself where one split has all keys; else each split's, not yet divided, with its peak and norm.

    Behind these the cache, where there is a new key and value.

    Args:
        packed: [slots, heads, head_dim]; with a new key and value the key heads of both stand behind the queries'.
    """
    slots, all_heads, head_dim = packed.shape
    kv_heads, keys = cache[0].shape[1:3]
    group, extends = heads // kv_heads, all_heads > heads
    # Whole tiles, though there may be fewer heads: what is behind them is neither read nor written.
    tile_rows = max(SMALLEST_ROWS, pl.next_power_of_2(group))
    # With room behind them for the tile that begins with the last one.
    all_rows = pl.BlockSpec((None, all_heads + tile_rows, head_dim), lambda s, h, p: (s, 0, 0))
    all_keys = pl.BlockSpec((None, None, keys, head_dim), lambda s, h, p: (s, h, 0, 0))
    numbers = pl.BlockSpec((slots,), lambda s, h, p: (0,))
    out = pl.BlockSpec((None, None, tile_rows, head_dim), lambda s, h, p: (s, h, 0, 0))
    results: list[Any] = [((slots, kv_heads, group, head_dim), packed.dtype, out)]
    if splits > 1:
        shape = (slots, kv_heads, splits, tile_rows)
        whole = pl.BlockSpec((None, None, None, tile_rows, head_dim), lambda s, h, p: (s, h, p, 0, 0))
        row = pl.BlockSpec((None, None, None, tile_rows), lambda s, h, p: (s, h, p, 0))
        results = [((*shape, head_dim), jnp.float32, whole), *[(shape, jnp.float32, row)] * 2]
    in_place = {1: len(results), 2: len(results) + 1} if extends else {}
    results += [(array.shape, array.dtype, all_keys) for array in cache if extends]
    return call(
        functools.partial(
            _kernel, step=tile.step, splits=splits, heads=heads, group=group, tile_rows=tile_rows, extends=extends
        ),
        (slots, kv_heads, splits),
        (packed, *cache, *places),
        [all_rows, all_keys, all_keys, numbers, numbers],
        results,
        interpret,
        tile.warps,
        tile.stages,
        in_place,
    )


def _kernel(packed_ref, k_ref, v_ref, first_ref, last_ref, *refs, step, splits, heads, group, tile_rows, extends):
    slot, head, split = (pl.program_id(i) for i in range(3))
    first, last = first_ref[slot], last_ref[slot]
    there = jnp.arange(tile_rows)[:, None] < group
    q = triton_backend.load(packed_ref.at[pl.ds(head * group, tile_rows), :], mask=there, other=0.0)
    zeros, zero_places = jnp.zeros(q.shape[:1], jnp.float32), jnp.zeros(q.shape[:1], jnp.int32)
    # Cached keys that are seen stand before this place.
    stop = last + 1
    result_refs = refs[:-2] if extends else refs
    if extends:
        k_cache_ref, v_cache_ref = refs[-2:]
        stop, places = last, (heads + head, heads + heads // group + head)
        # Before the loop: there is nothing to wait for then where it ends.
        k_row, v_row = (packed_ref[pl.ds(place, 1), :] for place in places)
        k_new, v_new = (_alone(packed_ref, place) for place in places)

    def add(number: Any, carry: Any) -> Any:
        place = number * step
        k, v = k_ref[pl.ds(place, step), :], v_ref[pl.ds(place, step), :]
        return _with_keys(carry, where_seen(scores_of(q, k), zero_places + first, zero_places + stop - 1, place), v)

    # A slot's own keys are shared out, not those of the cache: of a long cache most slots fill a part.
    begin, end = first // step, (stop + step - 1) // step
    share = pl.cdiv(end - begin, splits)
    low = begin + split * share
    high = jnp.minimum(low + share, end)
    found = zeros + MASKED_SCORE, zeros, jnp.zeros(q.shape, jnp.float32)
    found = jax.lax.fori_loop(low, high, add, found)
    if extends:
        # One of the instances writes the newest token, and sees it as the first key of a block of its own. Others may
        # read its place meanwhile, and multiply by 0 what they find, which must be finite.
        for row, ref in ((k_row, k_cache_ref), (v_row, v_cache_ref)):
            here = jnp.broadcast_to(split == 0, row.shape)
            triton_backend.store(ref.at[pl.ds(last, 1), :], row, mask=here)
        newest = where_seen(scores_of(q, k_new), zero_places, zero_places - jnp.minimum(split, 1), 0)
        found = _with_keys(found, newest, v_new)
    peak, norm, total = found
    if splits == 1:
        (out_ref,) = result_refs
        triton_backend.store(out_ref.at[...], (total / norm[:, None]).astype(out_ref.dtype), mask=there)
    else:
        total_ref, peak_ref, norm_ref = result_refs
        total_ref[...], peak_ref[...], norm_ref[...] = total, peak, norm


def _with_keys(found: Any, scores: Any, v: Any) -> Any:
    """Peak, norm and sum of values with some more keys."""
    peak, norm, total = found
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
    total = total * shrink[:, None] + product(weights.astype(v.dtype), v, (1, 0))
    return new_peak, norm * shrink + jnp.sum(weights, axis=1), total


def _alone(packed_ref: Any, place: Any) -> Any:
    """One row, as the first of the smallest block that there is, whose others are 0."""
    first = jnp.arange(SMALLEST_ROWS)[:, None] == 0
    return triton_backend.load(packed_ref.at[pl.ds(place, SMALLEST_ROWS), :], mask=first, other=0.0)
