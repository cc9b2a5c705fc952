"""Attention in blocks, on any device: memory linear in the row's length (arXiv:2112.05682, arXiv:2205.14135).

Scores exist for one block of queries and one of keys at a time; blocks that see nothing of each other, in packed rows
most of them, are left out. The backward pass computes them again from each query's log of the softmax's denominator.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxrft.models.attention.dense import MASKED_SCORE
from jaxrft.models.attention.mask import AttentionMask, blocks_of_keys, blocks_of_queries, padded_mask
from jaxrft.models.precision import matmul_precision

# Queries and keys of a block: a CPU's caches hold small ones, an accelerator is filled by large ones.
BLOCKS = {"cpu": (128, 256)}
ACCELERATOR_BLOCKS = (512, 1024)


def attend_chunked(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: AttentionMask,
    blocks: tuple[int, int] | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention with float32 scores and softmax, differentiable in reverse mode.

    Args:
        blocks: queries and keys of a block; None takes those of the platform.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wanted = blocks or BLOCKS.get(jax.default_backend(), ACCELERATOR_BLOCKS)
    query_block, key_block = min(wanted[0], time), min(wanted[1], keys)
    mask = padded_mask(mask, query_block)
    scaled = query * jnp.asarray(head_dim**-0.5, query.dtype)
    q = jnp.pad(scaled, ((0, 0), (0, -time % query_block), (0, 0), (0, 0)))
    q = q.reshape(batch, -1, query_block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    q = q.reshape(q.shape[0], batch * kv_heads, -1, head_dim)
    k, v = (_key_blocks(array, key_block) for array in (key, value))
    out = _attend(q, k, v, mask, kv_heads)
    out = out.reshape(-1, batch, kv_heads, heads // kv_heads, query_block, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, head_dim)[:, :time]


def _key_blocks(array: Array, size: int) -> Array:
    """[batch, kv_heads, keys, head_dim] -> [blocks, batch * kv_heads, size, head_dim]; no query sees the padding."""
    batch, kv_heads, keys, head_dim = array.shape
    array = jnp.pad(array, ((0, 0), (0, 0), (0, -keys % size), (0, 0)))
    return array.reshape(batch * kv_heads, -1, size, head_dim).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, kv_heads):
    return _forward(q, k, v, mask, kv_heads)[0]


def _scores(q, k, rows, key_number, kv_heads):
    """Masked scores of a block of queries, those of a group along the time axis, and one of keys."""
    first, last = rows
    size, query_block = k.shape[1], first.shape[1]
    scores = jnp.einsum("nqd,nkd->nqk", q, k, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32)
    seen = AttentionMask(first, last).visible(key_number * size + jnp.arange(size))
    parts = scores.reshape(-1, kv_heads, q.shape[1] // query_block, query_block, size)
    return jnp.where(seen[:, None, None], parts, MASKED_SCORE).reshape(scores.shape)


def _rows(mask, query_blocks):
    """``first`` and ``last`` of each block of queries: [blocks, one_or_batch, block]."""
    return tuple(a.reshape(a.shape[0], query_blocks, -1).swapaxes(0, 1) for a in (mask.first, mask.last))


def _bounds(low, high, most):
    """Of all rows of the batch together, one pair for each block."""
    return jnp.min(low, axis=0), jnp.minimum(jnp.max(high, axis=0), most)


def _zeros(shape, *like):
    """float32; inside shard_map different on the devices on which any of ``like`` is."""
    varying = frozenset().union(*(jax.typeof(array).mat.varying for array in like))
    return jax.lax.pcast(jnp.zeros(shape, jnp.float32), tuple(varying), to="varying")


def _forward(q, k, v, mask, kv_heads):
    blocks, n, size, head_dim = q.shape
    precision = matmul_precision(q.dtype)
    low, high = _bounds(*blocks_of_keys(mask, mask.first.shape[1] // blocks, k.shape[2]), k.shape[0])

    def one(block: Any) -> Any:
        q_block, rows, low, high = block

        def add(number: Any, carry: Any) -> Any:
            peak, norm, total = carry
            scores = _scores(q_block, k[number], rows, number, kv_heads)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
            part = jnp.einsum(
                "nqk,nkd->nqd", weights.astype(v.dtype), v[number],
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            return new_peak, norm * shrink + jnp.sum(weights, axis=-1), total * shrink[..., None] + part

        zeros = _zeros((n, size), q, k, v, mask.first, mask.last)
        start = (zeros + MASKED_SCORE, zeros, _zeros((n, size, head_dim), q, k, v, mask.first, mask.last))
        peak, norm, total = jax.lax.fori_loop(low, high, add, start)
        return (total / norm[..., None]).astype(q.dtype), peak + jnp.log(norm)

    return jax.lax.map(one, (q, _rows(mask, blocks), low, high))


def _attend_forward(q, k, v, mask, kv_heads):
    # A policy that keeps attention's result keeps both: without the second, the first pass would run again.
    out, log_norm = (checkpoint_name(a, "attention") for a in _forward(q, k, v, mask, kv_heads))
    return out, (q, k, v, mask, out, log_norm)


def _attend_backward(kv_heads, residuals, d_out):
    """With p = softmax(s): d s = p (d p - sum(p d p)), and sum(p d p) = sum(out d out)."""
    q, k, v, mask, out, log_norm = residuals
    blocks = q.shape[0]
    rows = _rows(mask, blocks)
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    query_block = mask.first.shape[1] // blocks
    low, high = _bounds(*blocks_of_queries(mask, query_block, k.shape[2], k.shape[0] * k.shape[2]), blocks)

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32)

    def one(d_q: Any, block: Any) -> Any:
        number, k_block, v_block, low, high = block

        def add(i: Any, carry: Any) -> Any:
            d_q, d_k, d_v = carry
            scores = _scores(q[i], k_block, (rows[0][i], rows[1][i]), number, kv_heads)
            weights = jnp.exp(scores - log_norm[i][..., None])
            d_v = d_v + product("nqk,nqd->nkd", weights.astype(d_out.dtype), d_out[i])
            d_weights = product("nqd,nkd->nqk", d_out[i], v_block)
            d_scores = (weights * (d_weights - mean[i][..., None])).astype(q.dtype)
            d_k = d_k + product("nqk,nqd->nkd", d_scores, q[i])
            return d_q.at[i].add(product("nqk,nkd->nqd", d_scores, k_block)), d_k, d_v

        nothing = _zeros(k_block.shape, q, k, v, d_out, mask.first, mask.last)
        d_q, d_k, d_v = jax.lax.fori_loop(low, high, add, (d_q, nothing, nothing))
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    start = _zeros(q.shape, q, k, v, d_out, mask.first, mask.last)
    d_q, (d_k, d_v) = jax.lax.scan(one, start, (jnp.arange(k.shape[0]), k, v, low, high))
    return d_q.astype(q.dtype), d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)
