"""Attention of each slot's newest token to its cache, in blocks of keys: those that no slot has are left out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.models.attention.chunked import zeros_like_all
from jaxrft.models.attention.dense import MASKED_SCORE, attend_dense
from jaxrft.models.attention.mask import AttentionMask
from jaxrft.models.precision import matmul_precision

# Of the keys of all slots: a CPU's caches hold that. In shorter blocks the loop's own time shows.
BLOCK_BYTES = 2**22
SMALLEST_BLOCK = 128


def attend_cached(
    query: Float[Array, "slots 1 heads head_dim"],
    key: Float[Array, "slots kv_heads keys head_dim"],
    value: Float[Array, "slots kv_heads keys head_dim"],
    mask: AttentionMask,
    block: int | None = None,
) -> Float[Array, "slots 1 heads head_dim"]:
    """Grouped-query attention of one query a slot, with float32 scores and softmax; not differentiable.

    What a block adds that a slot sees nothing of is exactly nothing: a slot's result does not depend on the others.

    Args:
        block: keys of a block; None takes as many as stay in a CPU's caches.
    """
    slots, _, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if block is None:
        fitting = BLOCK_BYTES // (slots * kv_heads * head_dim * key.dtype.itemsize)
        block = max(SMALLEST_BLOCK, fitting // SMALLEST_BLOCK * SMALLEST_BLOCK)
    if block >= keys:
        return attend_dense(query, key, value, mask)
    q = query.reshape(slots * kv_heads, heads // kv_heads, head_dim) * jnp.asarray(head_dim**-0.5, query.dtype)
    k, v = (array.reshape(slots * kv_heads, keys, head_dim) for array in (key, value))
    product = functools.partial(jnp.einsum, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32)

    def add(number: Any, carry: Any) -> Any:
        peak, norm, total = carry
        # The last block begins earlier where it would end behind the cache; what the one before it had is masked.
        start = jnp.minimum(number * block, keys - block)
        k_block, v_block = (jax.lax.dynamic_slice_in_dim(array, start, block, axis=1) for array in (k, v))
        places = start + jnp.arange(block)
        seen = mask.visible(places) & (places >= number * block)
        scores = product("nqd,nkd->nqk", q, k_block).reshape(slots, -1, block)
        scores = jnp.where(seen, scores, MASKED_SCORE).reshape(*q.shape[:2], block)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
        part = product("nqk,nkd->nqd", weights.astype(v.dtype), v_block)
        return new_peak, norm * shrink + jnp.sum(weights, axis=-1), total * shrink[..., None] + part

    arrays = (q, k, v, mask.first, mask.last)
    zeros = zeros_like_all(q.shape[:2], *arrays)
    carry = (zeros + MASKED_SCORE, zeros, zeros_like_all(q.shape, *arrays))
    low, high = jnp.min(mask.first) // block, jnp.max(mask.last) // block + 1
    _, norm, total = jax.lax.fori_loop(low, high, add, carry)
    return (total / norm[..., None]).astype(query.dtype).reshape(query.shape)
