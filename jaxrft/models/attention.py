"""Masks and grouped-query attention over dense score arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrft import parallel
from jaxrft.models.precision import matmul_precision

# Large enough to vanish in a softmax, small enough that a row with nothing to see stays finite.
MASKED_SCORE = -1e30


def causal_mask(
    length: int,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
) -> Bool[Array, "one_or_batch time time"]:
    """Which key (last axis) each query may see: itself and what stands before it in its segment.

    With ``sliding_window`` w, only the last w of these. Rows padded on the right need no mask
    of their own: no valid query stands behind the padding.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = query >= key
    if sliding_window is not None and sliding_window < length:
        mask &= query - key < sliding_window
    mask = mask[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def cache_mask(
    positions: Int[Array, "slots"], window: int, sliding_window: int | None = None
) -> Bool[Array, "slots 1 window"]:
    """Which cached key each slot's newest token, at ``positions``, may see."""
    key = jnp.arange(window)[None, :]
    mask = key <= positions[:, None]
    if sliding_window is not None:
        mask &= positions[:, None] - key < sliding_window
    return mask[:, None, :]


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: Bool[Array, "one_or_batch time keys"],
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention with float32 scores and softmax.

    Under a layout each device attends with its own rows, its own heads and its own time steps of the queries, to
    keys and values of the whole row, which are gathered where the time axis is sharded (context parallelism as in
    arXiv:2407.21783, section 3.3.2).
    """
    layout = parallel.current()
    if layout is None:
        return _attend(query, key, value, mask)
    queries = layout.activation(("batch", "time", "heads", None), query.shape)
    key, value = (_align_heads(a, query.shape[2], layout.mesh.shape["tensor"], queries) for a in (key, value))
    keys = PartitionSpec(queries[0], queries[2], None, None)
    masks = PartitionSpec(queries[0] if mask.shape[0] > 1 else None, queries[1], None)
    sharded = jax.shard_map(_attend, mesh=layout.mesh, in_specs=(queries, keys, keys, masks), out_specs=queries)
    return sharded(query, key, value, mask)


def _align_heads(x: Array, heads: int, tensor: int, queries: PartitionSpec) -> Array:
    """Keys or values with each key head where its query heads are: repeated where there are fewer than devices."""
    kv_heads = x.shape[1]
    if queries[2] is None or kv_heads % tensor == 0:
        return x
    return jnp.repeat(x, (tensor if tensor % kv_heads == 0 else heads) // kv_heads, axis=1)


def _attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: Bool[Array, "one_or_batch time keys"],
) -> Float[Array, "batch time heads head_dim"]:
    """Attention on one device.

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
    scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("nqk,nkd->nqd", weights.reshape(batch * kv_heads, group * time, keys), v, precision=precision)
    out = out.reshape(batch, kv_heads, group, time, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, time, heads, head_dim)
