"""The reduction of logits that reads them once, for NVIDIA GPUs, as a Pallas kernel that Triton compiles.

XLA's reads them twice, for the largest and then for the sums, and logits are gigabytes. On a CPU the kernel runs
interpreted: for tests.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_backend
from jaxtyping import Array, Float, Int

from jaxrft.models.attention.triton import call

# Threads of an instance, which has one row: few, so that a multiprocessor has several rows at a time, and one loads
# while another's threads join their sums.
WARPS = 4
# Columns of a block: 4 a thread, which are a load of 16 bytes.
LANES = 4 * 32 * WARPS
# Blocks that are loaded before the first is used.
BLOCKS = 4


def reduce_rows(
    logits: Float[Array, "tokens columns"],
    places: Int[Array, "tokens"],
    sharpness: Float[Array, "tokens"],
    interpret: bool | None = None,
) -> tuple[Float[Array, "tokens"], ...]:
    """The largest logit, sums over exp(logits - largest), and the target's logit, or 0 where it is elsewhere.

    Args:
        logits: float32.
        places: columns of the targets; of the logits' or not.
        interpret: run the kernel without Triton; None: where there is no GPU.
    """
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    tokens, columns = logits.shape
    # Whole blocks, of which the last's mask keeps it to the columns that there are.
    row = pl.BlockSpec((None, -(-columns // LANES) * LANES), lambda i: (i, 0))
    number = pl.BlockSpec((None,), lambda i: (i,))
    return tuple(
        call(
            functools.partial(_kernel, columns=columns),
            (tokens,),
            (logits, places, sharpness),
            [row, number, number],
            [((tokens,), jnp.float32, number)] * 4,
            interpret,
            WARPS,
        )
    )


def _kernel(logits_ref, place_ref, sharpness_ref, peak_ref, norm_ref, moment_ref, chosen_ref, *, columns):
    """Every lane has a peak and sums of its own: all threads' are joined once, behind the loop.

    Inside, exponents are in units of log 2. The sharpness takes the unit on, not the logits: the largest logit is
    taken off first, and is exactly 0.
    """
    scale = sharpness_ref[...] * math.log2(math.e)
    # A peak is at least a row's first logit, and where it begins.
    first = jnp.full((LANES,), logits_ref[0])
    load = functools.partial(_load, logits_ref, first)

    def add(step: Any, sums: Any) -> Any:
        start = step * (LANES * BLOCKS)
        return _with_blocks(sums, [load(start + LANES * i) for i in range(BLOCKS)], scale)

    steps, zeros = columns // (LANES * BLOCKS), jnp.zeros((LANES,), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add, (first, zeros, zeros))
    rest = [load(start, columns) for start in range(steps * LANES * BLOCKS, columns, LANES)]
    lanes, norm, moment = _with_blocks(sums, rest, scale)
    peak = jnp.max(lanes)
    norm, moment = _moved(norm, moment, (lanes - peak) * scale)
    peak_ref[...], norm_ref[...], moment_ref[...] = peak, jnp.sum(norm), jnp.sum(moment) * math.log(2)
    inside = (place_ref[...] >= 0) & (place_ref[...] < columns)
    chosen_ref[...] = jnp.where(inside, logits_ref[jnp.where(inside, place_ref[...], 0)], 0.0)


def _load(logits_ref: Any, fill: Any, start: Any, columns: int | None = None) -> tuple[Any, Any]:
    """A block of columns; which of its lanes are some: of a block that may pass the last column, else None."""
    block = logits_ref.at[pl.ds(start, LANES)]
    if columns is None or start + LANES <= columns:
        return block[...], None
    inside = jnp.arange(LANES) < columns - start
    return triton_backend.load(block, mask=inside, other=fill), inside


def _with_blocks(sums: Any, blocks: Any, scale: Any) -> Any:
    """The lanes' peaks and sums with some more blocks of columns."""
    old, norm, moment = sums
    peak = functools.reduce(jnp.maximum, [block for block, _ in blocks], old)
    norm, moment = _moved(norm, moment, (old - peak) * scale)
    for block, inside in blocks:
        shifted = (block - peak) * scale
        weights = jnp.exp2(shifted)
        weights = weights if inside is None else jnp.where(inside, weights, 0.0)
        norm, moment = norm + weights, moment + weights * shifted
    return peak, norm, moment


def _moved(norm: Any, moment: Any, shift: Any) -> tuple[Any, Any]:
    """The sums when ``shift`` is added to all exponents."""
    shrink = jnp.exp2(shift)
    return shrink * norm, shrink * (moment + shift * norm)
