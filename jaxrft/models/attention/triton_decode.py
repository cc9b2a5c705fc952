"""Attention of each slot's newest token to its cache, as a Pallas kernel that Triton compiles.

A cache is as long as the longest slot needs; of a shorter slot's only what it has is read. The keys of a slot are
split over several instances (as in Flash-Decoding), so that few slots keep a GPU busy too, and what these find is
joined after them.
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
# The multiprocessors of an H100 or H200.
INSTANCES = 132
# What several instances find is joined by a kernel of its own, which takes time: of caches of 384 places one instance
# for all of a slot's keys was the faster, with 16 and with 64 slots.
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


def usual(head_dim: int) -> DecodeTile:
    """By measurements on an H200: small instances, so that four or more of them are on a multiprocessor at a time."""
    return DecodeTile(32, 2 if head_dim <= 64 else 4, 3)


def usual_splits(heads: int, keys: int) -> int:
    """Instances that share the keys of one of so many heads of all slots: as many as fill the GPU."""
    return 1 if keys < SPLIT_FROM else min(-(-INSTANCES // heads), keys // SMALLEST_SPLIT)


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
        tile: None takes the usual one of the head size; of fewer keys at a time where they are no multiple of its step.
        interpret: run the kernel without Triton; None: where there is no GPU.

    Raises:
        ValueError: the number of keys is not a multiple of 16.
    """
    slots, _, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    tile = tile or usual(head_dim)
    tile = tile._replace(step=math.gcd(keys, tile.step))
    if tile.step < SMALLEST_ROWS:
        raise ValueError(f"key: got {keys} cached tokens, takes a multiple of {SMALLEST_ROWS}")
    splits = splits or usual_splits(slots * kv_heads, keys)
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    group = heads // kv_heads
    q = query.reshape(slots, kv_heads, group, head_dim)
    places = tuple(jnp.broadcast_to(a[:, 0], (slots,)) for a in (mask.first, mask.last))
    found = _run((q, key, value, *places), tile, splits, interpret)
    return (found[0] if splits == 1 else _joined(found, group).astype(query.dtype)).reshape(query.shape)


def _joined(found, group):
    """The result of all keys, from what each split found."""
    total, peak, norm = found
    total, peak, norm = total[..., :group, :], peak[..., :group], norm[..., :group]
    weights = jnp.exp2(peak - jnp.max(peak, axis=2, keepdims=True))
    return jnp.sum(total * weights[..., None], axis=2) / jnp.sum(norm * weights, axis=2)[..., None]


def _run(arguments, tile, splits, interpret):
    """The result itself where one split has all keys; else each split's, not yet divided, with its peak and norm."""
    q, key = arguments[:2]
    slots, kv_heads, group, head_dim = q.shape
    keys = key.shape[2]
    # Whole tiles, though there may be fewer heads: what is behind them is neither read nor written.
    rows = max(SMALLEST_ROWS, pl.next_power_of_2(group))
    queries = pl.BlockSpec((None, None, rows, head_dim), lambda s, h, p: (s, h, 0, 0))
    all_keys = pl.BlockSpec((None, None, keys, head_dim), lambda s, h, p: (s, h, 0, 0))
    places = pl.BlockSpec((slots,), lambda s, h, p: (0,))
    results = [(q.shape, q.dtype, queries)]
    if splits > 1:
        shape = (slots, kv_heads, splits, rows)
        whole = pl.BlockSpec((None, None, None, rows, head_dim), lambda s, h, p: (s, h, p, 0, 0))
        numbers = pl.BlockSpec((None, None, None, rows), lambda s, h, p: (s, h, p, 0))
        results = [((*shape, head_dim), jnp.float32, whole), *[(shape, jnp.float32, numbers)] * 2]
    return call(
        functools.partial(_kernel, step=tile.step, splits=splits, group=group),
        (slots, kv_heads, splits),
        arguments,
        [queries, all_keys, all_keys, places, places],
        results,
        interpret,
        tile.warps,
        tile.stages,
    )


def _kernel(q_ref, k_ref, v_ref, first_ref, last_ref, *result_refs, step, splits, group):
    slot, split = pl.program_id(0), pl.program_id(2)
    first, last = first_ref[slot], last_ref[slot]
    there = jnp.arange(q_ref.shape[0])[:, None] < group
    q = triton_backend.load(q_ref.at[...], mask=there, other=0.0)
    rows = jnp.zeros(q.shape[:1], jnp.int32)

    def add(number: Any, carry: Any) -> Any:
        peak, norm, total = carry
        place = number * step
        k, v = k_ref[pl.ds(place, step), :], v_ref[pl.ds(place, step), :]
        scores = where_seen(scores_of(q, k), rows + first, rows + last, place)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        total = total * shrink[:, None] + product(weights.astype(v.dtype), v, (1, 0))
        return new_peak, norm * shrink + jnp.sum(weights, axis=1), total

    # A slot's own keys are shared out, not those of the cache: of a long cache most slots fill a part.
    begin, end = first // step, last // step + 1
    share = pl.cdiv(end - begin, splits)
    low = begin + split * share
    high = jnp.minimum(low + share, end)
    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    start = (zeros + MASKED_SCORE, zeros, jnp.zeros(q.shape, jnp.float32))
    peak, norm, total = jax.lax.fori_loop(low, high, add, start)
    if len(result_refs) == 1:
        (out_ref,) = result_refs
        triton_backend.store(out_ref.at[...], (total / norm[:, None]).astype(out_ref.dtype), mask=there)
    else:
        total_ref, peak_ref, norm_ref = result_refs
        total_ref[...], peak_ref[...], norm_ref[...] = total, peak, norm
