"""The output projection with what is made of its logits at the end of the product, for Hopper GPUs.

A product whose float32 logits go to memory, to be read again, takes a quarter more time than the product: here each
tile of logits is reduced, or turned into its cotangents, where it lies in registers. Kernels of Pallas' Mosaic GPU, in
the form usual for this GPU: one warpgroup loads tiles ahead, two multiply, and each multiprocessor takes tile after
tile. While one of the two reduces a tile, the other may multiply.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

# Of a warpgroup's tile: tokens and words, both sums of several of the GPU's own products; and of what both warpgroups
# are given at a time, channels, and how many times they are given them ahead.
TOKENS, WORDS, CHANNELS, STEPS = 128, 128, 64, 4
WARPGROUPS = 2
# Words of a tile that are worked on, and stored, at a time: the rest of the shared memory has room for no more.
PART = 64
# Rows of tiles whose columns are taken in turn, so that what is read again is still in the GPU's cache.
NEIGHBOURS = 8
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
    (parts,) = _run(
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
    (found,) = _run(
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


def _run(kernel: Any, arguments: Any, results: Any, interpret: Any) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*result) for result in results],
        grid=(_multiprocessors(),),
        grid_names=("multiprocessor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arguments)


def _multiprocessors() -> int:
    """Of the GPU that is compiled for; of a CPU, which interprets the kernel, two."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    cores = getattr(jax.local_devices()[0], "core_count", None) if device is None else device.num_cores
    return cores or 2


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

        _for_each_tile(hidden, kernel, transposed, allocations, before, after)

    _with_memory(hidden, kernel, transposed, scratch, plgpu.SMEM((WARPGROUPS, 4, TOKENS), jnp.float32))


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

        _for_each_tile(hidden, kernel, transposed, allocations, before, after)

    memory = plgpu.SMEM((WARPGROUPS, TOKENS, PART), out.dtype, transforms=_transforms())
    _with_memory(hidden, kernel, transposed, scratch, memory)


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


def _transforms() -> tuple[Any, ...]:
    """How 64 numbers of 16 bits lie in shared memory, for the units that multiply and copy."""
    # A type checker takes them for abstract.
    backend: Any = plgpu
    return backend.TilingTransform((8, 64)), backend.SwizzleTransform(128)


def _pipeline(hidden, kernel, transposed, body: Callable[..., Any], context: Callable[..., Any]) -> Any:
    """Runs ``body`` on channel after channel of a tile, which are loaded ahead of it."""
    shape, place = ((WORDS, CHANNELS), lambda k: (0, k)) if transposed else ((CHANNELS, WORDS), lambda k: (k, 0))
    tokens = (WARPGROUPS * TOKENS, CHANNELS)
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(hidden.shape[1] // CHANNELS,),
        in_specs=[
            plgpu.BlockSpec(tokens, lambda k: (0, k), transforms=_transforms(), memory_space=plgpu.SMEM),
            plgpu.BlockSpec(shape, place, transforms=_transforms(), memory_space=plgpu.SMEM),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=40,
        max_concurrent_steps=min(STEPS, hidden.shape[1] // CHANNELS),
        compute_context=context,
    )


def _with_memory(hidden, kernel, transposed, scratch: Callable[..., None], memory: Any) -> None:
    """Runs ``scratch`` with what the pipeline needs, and with memory that the warpgroups share."""

    def nothing(*_: Any) -> None:
        pass

    allocations = _pipeline(hidden, kernel, transposed, nothing, nothing).get_allocations(hidden, kernel)

    def run(allocations: Any, found: Any) -> None:
        scratch(allocations, found)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(run, allocations, memory, collective_axes="warpgroup")


def _for_each_tile(hidden, kernel, transposed, allocations, before: Callable[..., Any], after: Callable[..., None]):
    """Has every multiprocessor multiply its tiles.

    Args:
        before: gives what ``after`` wants of some tokens, and is called before they are multiplied.
        after: is called with a warpgroup's logits, what ``before`` gave, the warpgroup, its tokens, and the tile's
            place among the columns of tiles.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    rows, columns = len(hidden) // (WARPGROUPS * TOKENS), kernel.shape[not transposed] // WORDS

    @plgpu.nd_loop((rows * columns,), collective_axes="multiprocessor")
    def tile(loop: Any) -> None:
        row, column = plgpu.planar_snake(loop.index[0], (rows, columns), 0, NEIGHBOURS)
        first = row * WARPGROUPS * TOKENS
        tokens = pl.ds(first + warpgroup * TOKENS, TOKENS)

        def context(multiply: Callable[..., None]) -> None:
            early = before(tokens)

            def finish(sums: Any) -> None:
                multiply(sums)
                after(sums[...], early, warpgroup, tokens, column)

            pl.run_scoped(finish, plgpu.ACC((TOKENS, WORDS), jnp.float32))

        def body(_: Any, states: Any, columns: Any, sums: Any) -> Any:
            plgpu.wgmma(
                sums, states.at[pl.ds(warpgroup * TOKENS, TOKENS)], columns.transpose((1, 0)) if transposed else columns
            )
            plgpu.wgmma_wait(0)
            return sums

        words = pl.ds(column * WORDS, WORDS)
        _pipeline(hidden, kernel, transposed, body, context)(
            hidden.at[pl.ds(first, WARPGROUPS * TOKENS), :],
            kernel.at[words, :] if transposed else kernel.at[:, words],
            allocations=allocations,
        )
