"""Attention: one function for all masks, devices and meshes, and the implementations it picks from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxrft import parallel
from jaxrft.models.attention.chunked import attend_chunked
from jaxrft.models.attention.cudnn import attend_cudnn
from jaxrft.models.attention.dense import attend_dense
from jaxrft.models.attention.mask import AttentionMask, cache_mask, causal_mask, segment_starts

# Each [slots, kv_heads, length, head_dim].
KeyValue = tuple[Array, Array]

__all__ = ["KERNELS", "AttentionMask", "attend", "attend_cached", "cache_mask", "causal_mask", "segment_starts"]


def _triton(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    # Pallas is loaded where it is used.
    from jaxrft.models.attention.triton import attend_triton

    return attend_triton(query, key, value, mask)


def _triton_decode(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    from jaxrft.models.attention.triton_decode import attend_triton_decode

    return attend_triton_decode(query, key, value, mask)


KERNELS: dict[str, Callable[..., Array]] = {
    "dense": attend_dense,
    "chunked": attend_chunked,
    "cudnn": attend_cudnn,
    "triton": _triton,
    "triton_decode": _triton_decode,
}


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention with float32 scores and softmax, by the implementation that the mask names.

    Under a layout each device attends with its own rows, its own heads and its own time steps of the queries, to
    keys and values of the whole row, which are gathered where the time axis is sharded (context parallelism as in
    arXiv:2407.21783, section 3.3.2).
    """
    layout = parallel.current()
    if layout is None:
        return KERNELS[mask.kernel](query, key, value, mask)
    queries, keys, masks = _specs(query, mask, layout)
    key, value = (_align_heads(a, query.shape[2], layout.mesh.shape["tensor"], queries) for a in (key, value))
    sharded = jax.shard_map(_attend_locally, mesh=layout.mesh, in_specs=(queries, keys, keys, masks), out_specs=queries)
    return sharded(query, key, value, mask)


def attend_cached(
    query: Float[Array, "slots 1 heads head_dim"],
    new: KeyValue,
    cache: KeyValue,
    mask: AttentionMask,
    window: int,
) -> tuple[Float[Array, "slots 1 heads head_dim"], KeyValue]:
    """Writes each slot's newest token to its cache, and attends from it to what it sees of that.

    Args:
        new: key and value of the newest token, of length 1.
        cache: keys and values of those before it.
        mask: as ``cache_mask`` makes it: the newest token stands at its ``last``.
        window: static; every ``last`` is below it.

    Returns:
        What ``attend`` gives, and the cache with the newest token.
    """
    layout = parallel.current()
    whole = window == cache[0].shape[2]
    if mask.kernel != "triton_decode" or not whole or not _heads_lie_together(query, cache[0], layout):
        key, value = _written(new, cache, mask)
        return attend(query, key[:, :, :window], value[:, :, :window], mask), (key, value)
    # One kernel writes and attends.
    if layout is None:
        return _extend_locally(query, new, cache, mask)
    # A pair of another type is another kind of tree.
    new, cache = (new[0], new[1]), (cache[0], cache[1])
    queries, keys, masks = _specs(query, mask, layout)
    specs = (queries, (keys, keys), (keys, keys), masks)
    sharded = jax.shard_map(_extend_locally, mesh=layout.mesh, in_specs=specs, out_specs=(queries, (keys, keys)))
    return sharded(query, new, cache, mask)


def _heads_lie_together(query: Array, key: Array, layout: parallel.Layout | None) -> bool:
    """Whether each device has the key heads of its query heads, and no others."""
    if layout is None:
        return True
    queries = layout.activation(("batch", "time", "heads", None), query.shape)
    tensor = layout.mesh.shape["tensor"]
    return queries[2] is None or aligned_kv_heads(query.shape[2], key.shape[1], tensor) == key.shape[1]


def _written(new: KeyValue, cache: KeyValue, mask: AttentionMask) -> KeyValue:
    rows, places = jnp.arange(cache[0].shape[0]), mask.last[:, 0]
    # Each row is another: a GPU stores without asking who else writes there.
    known: dict[str, Any] = {"unique_indices": True, "mode": "promise_in_bounds"}
    key, value = (part.at[rows, :, places].set(n[:, :, 0], **known) for part, n in zip(cache, new))
    return key, value


def _extend_locally(query: Array, new: KeyValue, cache: KeyValue, mask: AttentionMask) -> tuple[Array, KeyValue]:
    from jaxrft.models.attention.triton_decode import extend_triton_decode

    return extend_triton_decode(*_own((query, new, cache, mask)))


def _specs(query: Array, mask: AttentionMask, layout: parallel.Layout) -> tuple[Any, Any, Any]:
    """How queries, keys and masks lie on a mesh: keys and values of whole rows where the queries are."""
    queries = layout.activation(("batch", "time", "heads", None), query.shape)
    keys = PartitionSpec(queries[0], queries[2], None, None)
    places: Any = PartitionSpec(queries[0] if mask.first.shape[0] > 1 else None, queries[1])
    lengths: Any = None if mask.lengths is None else PartitionSpec(queries[0])
    return queries, keys, dataclasses.replace(mask, first=places, last=places, lengths=lengths)


def _attend_locally(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """On one device of a mesh."""
    return KERNELS[mask.kernel](*_own((query, key, value, mask)))


def _own(arrays: Any) -> Any:
    """What is the same on several devices of a mesh is made to be each one's own."""
    varying: frozenset[str] = functools.reduce(
        lambda a, b: a | b, (jax.typeof(a).mat.varying for a in jax.tree.leaves(arrays))
    )

    def own(array: Array) -> Array:
        missing = tuple(varying - jax.typeof(array).mat.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(own, arrays)


def _align_heads(x: Array, heads: int, tensor: int, queries: PartitionSpec) -> Array:
    """Keys or values with each key head where its query heads are: repeated where there are fewer than devices."""
    kv_heads = x.shape[1]
    repeats = 1 if queries[2] is None else aligned_kv_heads(heads, kv_heads, tensor) // kv_heads
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=1)


def aligned_kv_heads(heads: int, kv_heads: int, tensor: int) -> int:
    """Key heads, once so many that ``tensor`` devices can share them out, each with the query heads that they are for.

    Args:
        heads: of the queries, a multiple of ``tensor`` and of ``kv_heads``.
    """
    if kv_heads % tensor == 0:
        return kv_heads
    return tensor if tensor % kv_heads == 0 else heads
