"""Attention over a whole array of scores: the fastest for short rows, and what the others are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.models.attention.mask import AttentionMask
from jaxrft.models.precision import matmul_precision

# Large enough to vanish in a softmax, small enough that a row with nothing to see stays finite.
MASKED_SCORE = -1e30


def attend_dense(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention with float32 scores and softmax; memory grows with queries times keys.

    The query heads that share a key head are laid along the time axis, so that both products
    are plain batched matmuls over batch x key heads: several times faster on a CPU than the
    five-dimensional contraction.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    q = query.reshape(batch, time, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group * time, head_dim) * jnp.asarray(head_dim**-0.5, query.dtype)
    k = key.reshape(batch * kv_heads, keys, head_dim)
    v = value.reshape(batch * kv_heads, keys, head_dim)
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("nqd,nkd->nqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, time, keys)
    scores = jnp.where(mask.visible(jnp.arange(keys))[:, None, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("nqk,nkd->nqd", weights.reshape(batch * kv_heads, group * time, keys), v, precision=precision)
    out = out.reshape(batch, kv_heads, group, time, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, time, heads, head_dim)
