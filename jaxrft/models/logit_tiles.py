"""Tiles of a matrix product on a Hopper GPU, each handed to what works on it in registers.

The frame of the kernels in ``logit_product.py``, by Pallas' Mosaic GPU: one warpgroup loads ahead, two multiply, and
each multiprocessor takes tile after tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrft.models.logit_chunks import ALIGNMENT

# Of a warpgroup's tile: tokens and words, both sums of several of the GPU's own products; and of what both warpgroups
# are given at a time, channels, and how many times they are given them ahead.
TOKENS, WORDS, CHANNELS, STEPS = 128, ALIGNMENT, 64, 4
WARPGROUPS = 2
# Words of a tile that are worked on, and stored, at a time: the rest of the shared memory has room for no more.
PART = 64
# Rows of tiles whose columns are taken in turn, so that what is read again is still in the GPU's cache.
NEIGHBOURS = 8


def run(kernel: Any, arguments: Any, results: Any, interpret: Any) -> Any:
    """Runs a kernel on every multiprocessor.

    Args:
        arguments: arrays.
        results: (shape, dtype) of each result.
        interpret: Pallas' parameters to run it without a GPU.
    """
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


def transforms() -> tuple[Any, ...]:
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
            plgpu.BlockSpec(tokens, lambda k: (0, k), transforms=transforms(), memory_space=plgpu.SMEM),
            plgpu.BlockSpec(shape, place, transforms=transforms(), memory_space=plgpu.SMEM),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        memory_registers=40,
        max_concurrent_steps=min(STEPS, hidden.shape[1] // CHANNELS),
        compute_context=context,
    )


def with_memory(hidden, kernel, transposed, scratch: Callable[..., None], memory: Any) -> None:
    """Runs ``scratch`` with what the pipeline needs, and with memory that the warpgroups share."""

    def nothing(*_: Any) -> None:
        pass

    allocations = _pipeline(hidden, kernel, transposed, nothing, nothing).get_allocations(hidden, kernel)

    def with_it(allocations: Any, found: Any) -> None:
        scratch(allocations, found)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(with_it, allocations, memory, collective_axes="warpgroup")


def for_each_tile(hidden, kernel, transposed, allocations, before: Callable[..., Any], after: Callable[..., None]):
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
