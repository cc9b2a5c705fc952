"""FlashAttention-2 (arXiv:2307.08691) for NVIDIA GPUs, as Pallas kernels that Triton compiles.

Of each block of queries only the blocks of keys that it sees are visited, so that a packed row costs what its segments
cost apart, and a key head is read once for the query heads that share it. On a CPU the kernels run interpreted: for
tests.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_backend
from jaxtyping import Array, Float

from jaxrft.models.attention.mask import AttentionMask, blocks_of_keys, blocks_of_queries, padded_mask
from jaxrft.models.attention.triton_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel


class Tiles(NamedTuple):
    """Rows of the kernels' blocks, powers of two of at least 16.

    Attributes:
        query, key: of the forward pass.
        query_backward, key_backward: of both kernels of the backward pass, which hold more at a time.
    """

    query: int = 128
    key: int = 64
    query_backward: int = 64
    key_backward: int = 64


def attend_triton(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads keys head_dim"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: AttentionMask,
    tiles: Tiles | None = None,
    interpret: bool | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention with float32 scores and softmax, differentiable in reverse mode.

    Args:
        query: of 16 bits a number on a GPU; its head size a power of two of at least 16.
        tiles: None takes the usual ones.
        interpret: run the kernels without Triton; None: where there is no GPU.
    """
    time, keys, tiles = query.shape[1], key.shape[2], tiles or Tiles()
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    mask = padded_mask(mask, max(tiles.query, tiles.query_backward))
    query = jnp.pad(query, ((0, 0), (0, mask.first.shape[1] - time), (0, 0), (0, 0)))
    # No query sees the padding.
    more = -keys % max(tiles.key, tiles.key_backward)
    key, value = (jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))) for a in (key, value))
    first, last = (jnp.broadcast_to(a, (query.shape[0], a.shape[1])) for a in (mask.first, mask.last))
    return _attend(query, key, value, AttentionMask(first, last), tiles, interpret)[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, mask, tiles, interpret):
    return _forward(query, key, value, mask, tiles, interpret)[0]


def call(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Any,
    specs: Any,
    results: Any,
    interpret: bool,
    warps: int | None = None,
) -> Any:
    """Runs a kernel over a grid.

    Args:
        arguments, specs: arrays, and which block of each an instance has.
        results: (shape, dtype, spec) of each result.
        warps: of an instance; None: attention's, by the head size.
    """
    # Inside shard_map the results differ on the devices on which the arguments do.
    kind = jax.typeof(arguments[0]).mat
    if warps is None:
        warps = 4 if arguments[0].shape[-1] <= 64 else 8
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=[spec for *_, spec in results],
        out_shape=[jax.ShapeDtypeStruct(s, t, manual_axis_type=kind) for s, t, _ in results],
        compiler_params=triton_backend.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
    )(*arguments)


def _forward(query, key, value, mask, tiles, interpret):
    batch, time, heads, head_dim = query.shape
    group, keys = heads // key.shape[1], key.shape[2]
    bounds = blocks_of_keys(mask, tiles.query, tiles.key)
    blocks = time // tiles.query
    rows = pl.BlockSpec((None, tiles.query), lambda i, b, h: (b, i))
    own = pl.BlockSpec((None, tiles.query, None, head_dim), lambda i, b, h: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, None, keys, head_dim), lambda i, b, h: (b, h // group, 0, 0))
    all_bounds = pl.BlockSpec((None, blocks), lambda i, b, h: (b, 0))
    norms = pl.BlockSpec((None, None, tiles.query), lambda i, b, h: (b, h, i))
    return call(
        functools.partial(forward_kernel, key_block=tiles.key),
        (blocks, batch, heads),
        (query, key, value, mask.first, mask.last, *bounds),
        [own, all_keys, all_keys, rows, rows, all_bounds, all_bounds],
        [(query.shape, query.dtype, own), ((batch, heads, time), jnp.float32, norms)],
        interpret,
    )


def _attend_forward(query, key, value, mask, tiles, interpret):
    # A policy that keeps attention's result keeps both: without the second, the first pass would run again.
    out, norm = (checkpoint_name(a, "attention") for a in _forward(query, key, value, mask, tiles, interpret))
    return out, (query, key, value, mask, out, norm)


def _attend_backward(tiles, interpret, residuals, d_out):
    query, key, value, mask, out, norm = residuals
    # With p = softmax(s): d s = p (d p - sum(p d p)), and sum(p d p) = sum(out d out).
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    shared = (query, key, value, d_out, norm, mean, mask.first, mask.last)
    d_query = _query_gradient(shared, tiles, interpret)
    d_key, d_value = _key_gradients(shared, tiles, interpret)
    return d_query, d_key, d_value, None


def _query_gradient(shared, tiles, interpret):
    query, key, *_, first, last = shared
    batch, time, heads, head_dim = query.shape
    group, keys, rows = heads // key.shape[1], key.shape[2], tiles.query_backward
    bounds = blocks_of_keys(AttentionMask(first, last), rows, tiles.key_backward)
    own = pl.BlockSpec((None, rows, None, head_dim), lambda i, b, h: (b, i, h, 0))
    all_keys = pl.BlockSpec((None, None, keys, head_dim), lambda i, b, h: (b, h // group, 0, 0))
    numbers = pl.BlockSpec((None, None, rows), lambda i, b, h: (b, h, i))
    places = pl.BlockSpec((None, rows), lambda i, b, h: (b, i))
    all_bounds = pl.BlockSpec((None, time // rows), lambda i, b, h: (b, 0))
    (gradient,) = call(
        functools.partial(query_gradient_kernel, key_block=tiles.key_backward),
        (time // rows, batch, heads),
        (*shared, *bounds),
        [own, all_keys, all_keys, own, numbers, numbers, places, places, all_bounds, all_bounds],
        [(query.shape, query.dtype, own)],
        interpret,
    )
    return gradient


def _key_gradients(shared, tiles, interpret):
    query, key, value, *_, first, last = shared
    batch, time, heads, head_dim = query.shape
    kv_heads, keys, columns = key.shape[1], key.shape[2], tiles.key_backward
    group = heads // kv_heads
    bounds = blocks_of_queries(AttentionMask(first, last), tiles.query_backward, columns, keys)
    all_queries = pl.BlockSpec((None, time, group, head_dim), lambda j, b, h: (b, 0, h, 0))
    own = pl.BlockSpec((None, None, columns, head_dim), lambda j, b, h: (b, h, j, 0))
    numbers = pl.BlockSpec((None, group, time), lambda j, b, h: (b, h, 0))
    places = pl.BlockSpec((None, time), lambda j, b, h: (b, 0))
    all_bounds = pl.BlockSpec((None, keys // columns), lambda j, b, h: (b, 0))
    return call(
        functools.partial(key_gradient_kernel, query_block=tiles.query_backward, group=group),
        (keys // columns, batch, kv_heads),
        (*shared, *bounds),
        [all_queries, own, own, all_queries, numbers, numbers, places, places, all_bounds, all_bounds],
        [(key.shape, key.dtype, own), (value.shape, value.dtype, own)],
        interpret,
    )


_attend.defvjp(_attend_forward, _attend_backward)
