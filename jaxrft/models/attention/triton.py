"""FlashAttention-2 (arXiv:2307.08691) for NVIDIA GPUs, as Pallas kernels that Triton compiles.

Of each block of queries only the blocks of keys that it sees are visited, so that a packed row costs what its segments
cost apart. On a CPU the kernels run interpreted: for tests.
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

from jaxrft.models.attention.mask import AttentionMask, padded_mask, whole_blocks_of_keys, whole_blocks_of_queries
from jaxrft.models.attention.triton_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel


class Tile(NamedTuple):
    """How one kernel is cut.

    Attributes:
        own: rows that an instance has: queries, or of the key gradient's kernel keys. A power of two of at least 16.
        step: rows of the other side that it takes at a time, likewise.
        warps: of an instance.
        stages: blocks of the other side that are on their way or in use at a time.
    """

    own: int
    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels."""

    forward: Tile
    query: Tile
    key: Tile


# By the head size, for a Hopper GPU: no kernel has more in registers than there are, and what comes next is loaded a
# block ahead (with two stages it is waited for at once), where the shared memory suffices.
LARGE = Tile(128, 64, 8, 3)
SMALL = Tile(64, 64, 4, 3)
USUAL = {
    16: Tiles(Tile(128, 64, 4, 3), SMALL, SMALL),
    32: Tiles(Tile(128, 64, 4, 3), SMALL, SMALL),
    64: Tiles(Tile(128, 64, 4, 3), LARGE, LARGE),
    128: Tiles(LARGE, LARGE, LARGE),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 3)),
}


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
        query: of 16 bits a number on a GPU; its head size one of ``USUAL``, or with tiles any power of two from 16 on.
        tiles: None takes the usual ones of the head size.
        interpret: run the kernels without Triton; None: where there is no GPU.
    """
    time, keys, tiles = query.shape[1], key.shape[2], tiles or USUAL[query.shape[3]]
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    mask = padded_mask(mask, max(tiles.forward.own, tiles.query.own, tiles.key.step))
    query = jnp.pad(query, ((0, 0), (0, mask.first.shape[1] - time), (0, 0), (0, 0)))
    # No query sees the padding.
    more = -keys % max(tiles.forward.step, tiles.query.step, tiles.key.own)
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
    warps: int,
    stages: int = 2,
    in_place: dict[int, int] | None = None,
) -> Any:
    """Runs a kernel over a grid.

    Args:
        arguments, specs: arrays, and which block of each an instance has.
        results: (shape, dtype, spec) of each result.
        warps, stages: of an instance; see :class:`Tile`.
        in_place: which argument becomes which result, by their numbers; what the kernel does not write stays.
    """
    # Inside shard_map the results differ on the devices on which the arguments do.
    kind = jax.typeof(arguments[0]).mat
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=[spec for *_, spec in results],
        out_shape=[jax.ShapeDtypeStruct(s, t, manual_axis_type=kind) for s, t, _ in results],
        compiler_params=triton_backend.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        input_output_aliases=in_place or {},
    )(*arguments)


def _query_specs(query, key, own):
    """Which blocks an instance has that computes a block of queries: of queries, keys, numbers, places and bounds."""
    blocks, head_dim, keys = query.shape[1] // own, query.shape[3], key.shape[2]
    group = query.shape[2] // key.shape[1]
    # Instances start in the order of the grid, heads first. The last queries see the most: the longest start first, so
    # that none is left alone at the end.
    return (
        pl.BlockSpec((None, own, None, head_dim), lambda h, b, i: (b, blocks - 1 - i, h, 0)),
        pl.BlockSpec((None, None, keys, head_dim), lambda h, b, i: (b, h // group, 0, 0)),
        pl.BlockSpec((None, None, own), lambda h, b, i: (b, h, blocks - 1 - i)),
        pl.BlockSpec((None, own), lambda h, b, i: (b, blocks - 1 - i)),
        pl.BlockSpec((None, None, 4), lambda h, b, i: (b, blocks - 1 - i, 0)),
    )


def _forward(query, key, value, mask, tiles, interpret):
    batch, time, heads, _ = query.shape
    own, step, *threads = tiles.forward
    rows, all_keys, numbers, places, bounds = _query_specs(query, key, own)
    return call(
        functools.partial(forward_kernel, step=step),
        (heads, batch, time // own),
        (query, key, value, mask.first, mask.last, whole_blocks_of_keys(mask, own, step)),
        [rows, all_keys, all_keys, places, places, bounds],
        [(query.shape, query.dtype, rows), ((batch, heads, time), jnp.float32, numbers)],
        interpret,
        *threads,
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
    batch, time, heads, _ = query.shape
    own, step, *threads = tiles.query
    rows, all_keys, numbers, places, bounds = _query_specs(query, key, own)
    (gradient,) = call(
        functools.partial(query_gradient_kernel, step=step),
        (heads, batch, time // own),
        (*shared, whole_blocks_of_keys(AttentionMask(first, last), own, step)),
        [rows, all_keys, all_keys, rows, numbers, numbers, places, places, bounds],
        [(query.shape, query.dtype, rows)],
        interpret,
        *threads,
    )
    return gradient


def _key_gradients(shared, tiles, interpret):
    query, key, *_, first, last = shared
    batch, time, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    own, step, *threads = tiles.key
    group = heads // kv_heads
    # An instance has one query head: with all of a group there would be fewer of them than multiprocessors.
    all_queries = pl.BlockSpec((None, time, None, head_dim), lambda h, b, j: (b, 0, h, 0))
    rows = pl.BlockSpec((None, None, own, head_dim), lambda h, b, j: (b, h // group, j, 0))
    numbers = pl.BlockSpec((None, None, time), lambda h, b, j: (b, h, 0))
    places = pl.BlockSpec((None, time), lambda h, b, j: (b, 0))
    bounds = pl.BlockSpec((None, None, 4), lambda h, b, j: (b, j, 0))
    result = pl.BlockSpec((None, None, own, head_dim), lambda h, b, j: (b, h, j, 0))
    # A group's heads are summed in float32: each rounded before would add as large an error as the last rounding.
    kind = key.dtype if group == 1 else jnp.float32
    gradients = call(
        functools.partial(key_gradient_kernel, step=step),
        (heads, batch, keys // own),
        (*shared, whole_blocks_of_queries(AttentionMask(first, last), step, own, keys)),
        [all_queries, rows, rows, all_queries, numbers, numbers, places, places, bounds],
        [((batch, heads, keys, head_dim), kind, result)] * 2,
        interpret,
        *threads,
    )
    return [a.reshape(batch, kv_heads, group, keys, head_dim).sum(2).astype(key.dtype) for a in gradients]


_attend.defvjp(_attend_forward, _attend_backward)
