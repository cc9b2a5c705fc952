"""The output projection with what is made of its logits at the end of the product, for Hopper GPUs.

A product whose float32 logits go to memory, to be read again, takes a fifth more time than the product: here each
tile of logits is reduced, or turned into its cotangents, where it lies in registers. While one of the two warpgroups
that multiply (``logit_tiles.py``) does so, the other may go on.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrft.models.logit_tiles import (
    CHANNELS,
    PART,
    TOKENS,
    WARPGROUPS,
    WORDS,
    for_each_tile,
    run,
    transforms,
    with_memory,
)

LOG2_E = math.log2(math.e)

ROWS = plgpu.Layout.WGMMA.reduce(1)


def refusal(dtype: Any, hidden: int, words: int, transposed: bool) -> str | None:
    """Why the kernels take no such projection; None: they do.

    Args:
        dtype: of hidden states and kernel.
        hidden, words: rows and columns of the kernel, on a device.
        transposed: the kernel is [words, hidden].
    """
    if jnp.dtype(dtype).itemsize != 2:
        return f"takes 16 bits, not {jnp.dtype(dtype).name}"
    if hidden % CHANNELS:
        return f"takes multiples of {CHANNELS} channels, not {hidden}"
    # As many as lie together in shared memory.
    multiple = 8 if transposed else CHANNELS
    if words < WORDS or words % multiple:
        return f"takes a multiple of {multiple} words, {WORDS} at least, not {words}"
    return None


def reduce_product(
    hidden: Float[Array, "tokens hidden"],
    kernel: Float[Array, "hidden words"] | Float[Array, "words hidden"],
    places: Int[Array, "tokens"],
    sharpness: Float[Array, "tokens"],
    transposed: bool,
    interpret: Any = None,
) -> tuple[Float[Array, "tiles tokens"], ...]:
    """What :func:`jaxrft.models.logit_kernel.reduce_rows` gives, of each 128 columns of ``hidden @ kernel``.

    Columns behind the last 128 are left out.

    Args:
        places: words of the targets; of the kernel's or not.
        transposed: the kernel is [words, hidden].
        interpret: Pallas' parameters to run the kernel without a GPU.
    """
    tokens, words = len(hidden), kernel.shape[not transposed]
    hidden, places, sharpness = (_whole(array) for array in (hidden, places, sharpness))
    shape = (4, words // WORDS, len(hidden))
    (parts,) = run(
        functools.partial(_reduce_kernel, transposed=transposed, interpret=interpret),
        (hidden, kernel, places, sharpness * LOG2_E),
        [(shape, jnp.float32)],
        interpret,
    )
    peaks, sums, moments, chosen = parts[:, :, :tokens]
    return peaks, sums, moments * math.log(2), chosen


class Cotangents(NamedTuple):
    """What logits' cotangents are made of, for each token.

    With x the logit, and y = (x - peak) slope - log_norm the log of its probability to the base of 2, a cotangent is
    2 ** y (factor + log_factor y), and the target's is ``target`` more.
    """

    peak: Float[Array, "tokens"]
    slope: Float[Array, "tokens"]
    log_norm: Float[Array, "tokens"]
    factor: Float[Array, "tokens"]
    log_factor: Float[Array, "tokens"]
    target: Float[Array, "tokens"]


def cotangents_of(sharpness, entropy, peak, log_norm, d_logprobs, d_entropy) -> Cotangents:
    """For d logprob / d z = onehot - p, and d entropy / d z = -p (log p + entropy), where z = sharpness x."""
    factor = -(d_logprobs + d_entropy * entropy) * sharpness
    log_factor = -d_entropy * sharpness * math.log(2)
    return Cotangents(peak, sharpness * LOG2_E, log_norm * LOG2_E, factor, log_factor, d_logprobs * sharpness)


def differentiate_product(
    hidden: Float[Array, "tokens hidden"],
    kernel: Float[Array, "hidden words"] | Float[Array, "words hidden"],
    places: Int[Array, "tokens"],
    rows: Cotangents,
    transposed: bool,
    interpret: Any = None,
) -> Float[Array, "tokens words"]:
    """Cotangents of the logits ``hidden @ kernel``, in the type of ``hidden``; see :func:`reduce_product`."""
    tokens, words = len(hidden), kernel.shape[not transposed]
    hidden, places = _whole(hidden), _whole(places)
    widths = ((0, -words % WORDS), (0, 0))
    kernel = jnp.pad(kernel, widths if transposed else widths[::-1])
    (found,) = run(
        functools.partial(_differentiate_kernel, transposed=transposed, interpret=interpret),
        (hidden, kernel, places, *(_whole(row) for row in rows)),
        [((len(hidden), kernel.shape[not transposed]), hidden.dtype)],
        interpret,
    )
    return found[:tokens, :words]


def _whole(array: Array) -> Array:
    """With rows behind it, so that they fill tiles."""
    missing = -len(array) % (WARPGROUPS * TOKENS)
    return jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1)) if missing else array


def _reduce_kernel(hidden, kernel, places, scale, out, *, transposed, interpret):
    def scratch(allocations: Any, found: Any) -> None:
        def before(tokens: Any) -> Any:
            return [_load(ref, tokens, interpret) for ref in (places, scale)]

        def after(logits: Any, rows: Any, warpgroup: Any, tokens: Any, column: Any) -> None:
            place, scale = rows
            peak = logits.max(axis=1)
            # Of all words at a time, threads would have more numbers than registers.
            parts = []
            for start in range(0, WORDS, PART):
                part = logits[:, start : start + PART]
                shifted = (part - _wide(peak)) * _wide(scale)
                weights = jnp.exp2(shifted)
                chosen = jnp.where(_words(part, column * WORDS + start, interpret) == _wide(place), part, 0.0)
                parts.append([array.sum(axis=1) for array in (weights, weights * shifted, chosen)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, row in enumerate((peak, *(functools.reduce(jnp.add, sums) for sums in zip(*parts)))):
                found[warpgroup, i] = row
            plgpu.commit_smem()
            for i in range(4):
                plgpu.copy_smem_to_gmem(found.at[warpgroup, i], out.at[i, column, tokens])

        for_each_tile(hidden, kernel, transposed, allocations, before, after)

    with_memory(hidden, kernel, transposed, scratch, plgpu.SMEM((WARPGROUPS, 4, TOKENS), jnp.float32))


def _differentiate_kernel(hidden, kernel, places, *refs, transposed, interpret):
    *rows, out = refs

    def scratch(allocations: Any, found: Any) -> None:
        def before(tokens: Any) -> Any:
            return [_load(ref, tokens, interpret) for ref in (places, *rows)]

        def after(logits: Any, rows: Any, warpgroup: Any, tokens: Any, column: Any) -> None:
            for start in range(0, WORDS, PART):
                part = logits[:, start : start + PART]
                place, peak, slope, log_norm, factor, log_factor, target = (_wide(row) for row in rows)
                log_p = (part - peak) * slope - log_norm
                d_logits = jnp.exp2(log_p) * (factor + log_factor * log_p)
                first = column * WORDS + start
                d_logits = jnp.where(_words(part, first, interpret) == place, d_logits + target, d_logits)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                found[warpgroup] = d_logits.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(found.at[warpgroup], out.at[tokens, pl.ds(first, PART)])

        for_each_tile(hidden, kernel, transposed, allocations, before, after)

    memory = plgpu.SMEM((WARPGROUPS, TOKENS, PART), out.dtype, transforms=transforms())
    with_memory(hidden, kernel, transposed, scratch, memory)


def _load(ref: Any, tokens: Any, interpret: Any) -> Any:
    """Numbers of a tile's rows, each where its row's logits are."""
    if interpret:
        # What names a place JAX 0.10 does not interpret.
        return ref[tokens]
    load: Any = plgpu.load
    what = (ref.at[tokens],) if jax.__version_info__ >= (0, 11) else (ref, tokens)
    return load(*what, layout=ROWS, optimized=False)


def _wide(row: Any) -> Any:
    return jax.lax.broadcast_in_dim(row, (TOKENS, PART), [0])


def _words(logits: Any, first: Any, interpret: Any) -> Any:
    """The word of each logit, where the first column's is ``first``."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + first
    return plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA) + first
