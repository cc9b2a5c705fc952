"""Products with parameters, and lookups in them, for parameters that lie sharded.

A parameter is cast to the type of computation and then gathered, where it is used; what the backward pass keeps of
it is the parameter as it lies, which is cast and gathered again. Without that, the gathered parameters of all layers
would be kept from the forward to the backward pass, and sharding them would save nothing. Gradients of parameters
are summed in float32, over tokens and over devices, and reduced to where the strategy keeps them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrft import parallel
from jaxrft.models.precision import matmul_precision
from jaxrft.models.quantization import QuantizedKernel

Axes = tuple[str, str]


def leading(x: Array) -> tuple[str | None, ...]:
    """Names of an activation's axes before its last one."""
    return ("batch", "time")[: x.ndim - 1] + (None,) * (x.ndim - 3)


def _product(x: Array, w: Array, dtype: Any = None) -> Array:
    options: dict[str, Any] = {"precision": matmul_precision(x.dtype), "preferred_element_type": dtype}
    if _flattens():
        return jnp.matmul(x.reshape(-1, x.shape[-1]), w, **options).reshape(*x.shape[:-1], -1)
    return jnp.matmul(x, w, **options)


def _flattens() -> bool:
    """Whether batch and time become one axis in products.

    On a CPU the kernel's gradient over two axes makes strided copies: a training step takes 1.4 times as long. Where
    the time axis is sharded, the two cannot be one.
    """
    layout = parallel.current()
    return jax.default_backend() == "cpu" and (layout is None or layout.mesh.shape["sequence"] == 1)


def project(
    x: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"] | QuantizedKernel,
    axes: Axes,
    units: tuple[int, int],
) -> Float[Array, "... outputs"]:
    """``x @ kernel`` in the type of ``x``.

    Args:
        x: one, two or three axes: [batch, time, inputs].
        kernel: the parameter, of any floating-point type and placement; a quantised one has no gradient.
        axes: logical names of the kernel's axes.
        units: blocks of each of them that must not be cut.
    """
    if isinstance(kernel, QuantizedKernel):
        return _project_quantized(x, kernel, axes, units)
    return _project_trained(x, kernel, axes, units)


def _project_quantized(x, kernel, axes, units):
    # A conversion that waits for nothing would be moved to the start of the program, out of its loop over tokens, and
    # the wider kernels of all layers would lie in memory, to be read in the 8 bits' place.
    kernel, x = jax.lax.optimization_barrier((kernel, x))
    w = parallel.gather(kernel.values, axes, units).astype(x.dtype)
    # Before it is scaled the product may be too large for float16.
    y = _product(x, w, jnp.float32) * parallel.gather(kernel.scale, axes[1:], units[1:])
    return _placed(y.astype(x.dtype), axes, units)


def _placed(y, axes, units):
    return parallel.constrain(y, (*leading(y), axes[1]), (*y.shape[:-1], units[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project_trained(x, kernel, axes, units):
    return _project(x, kernel, axes, units)


def _project(x, kernel, axes, units):
    return _placed(_product(x, parallel.gather(kernel.astype(x.dtype), axes, units)), axes, units)


def _project_forward(x, kernel, axes, units):
    return _project(x, kernel, axes, units), (x, kernel)


def _project_backward(axes, units, residuals, dy):
    x, kernel = residuals
    kernel, dy = parallel.apart(kernel, dy)
    w = parallel.gather(kernel.astype(x.dtype), axes, units)
    dx = parallel.constrain(_product(dy, w.T), (*leading(x), axes[0]), (*x.shape[:-1], units[0]))
    if _flattens():
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    contracted = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(
        x,
        dy,
        ((contracted, contracted), ((), ())),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return dx, parallel.constrain_gradient(dw, axes, units).astype(kernel.dtype)


_project_trained.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shift(
    y: Float[Array, "... outputs"], bias: Float[Array, "outputs"], axes: tuple[str], units: tuple[int]
) -> Float[Array, "... outputs"]:
    """``y + bias`` in the type of ``y``; axes and units are those of the bias, as in :func:`project`."""
    return y + parallel.gather(bias.astype(y.dtype), axes, units)


def _shift_forward(y, bias, axes, units):
    return shift(y, bias, axes, units), bias


def _shift_backward(axes, units, bias, dy):
    # JAX sums what was broadcast in the type of ``y``: in 16 bits a sum over thousands of tokens comes to a stop.
    d_bias = jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=jnp.float32)
    return dy, parallel.constrain_gradient(d_bias, axes, units).astype(bias.dtype)


shift.defvjp(_shift_forward, _shift_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "vocab hidden"], tokens: Int[Array, "batch time"], dtype: Any
) -> Float[Array, "batch time hidden"]:
    """Rows of an embedding table, whose axes are ``vocab`` and ``embed``, in type ``dtype``."""
    return _lookup(table, tokens, dtype)


def _lookup(table, tokens, dtype):
    table = table.astype(dtype)
    layout = parallel.current()
    if layout is None:
        return table[tokens]
    placed, table_spec = _lookup_specs(layout, table, tokens)

    def local(rows, tokens):
        place, inside = _local_places(rows.shape[0], tokens, table_spec)
        found = jnp.where(inside[..., None], rows[place], 0)
        return jax.lax.psum(found, "tensor") if "tensor" in parallel.mesh_axes(table_spec) else found

    out = jax.sharding.PartitionSpec(*placed, None)
    table = parallel.as_cast(table)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=(table_spec, placed), out_specs=out)(table, tokens)


def _lookup_specs(layout, table, tokens):
    return layout.activation(("batch", "time"), tokens.shape), layout.gathered(("vocab", "embed"), table.shape)


def _local_places(size, tokens, table_spec):
    """Where a device's part of the table holds the tokens, and whether it does."""
    first = jax.lax.axis_index("tensor") * size if "tensor" in parallel.mesh_axes(table_spec) else 0
    inside = (tokens >= first) & (tokens < first + size)
    return jnp.where(inside, tokens - first, 0), inside


def _lookup_forward(table, tokens, dtype):
    return _lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype, residuals, d_rows):
    table, tokens = residuals
    shape = table.shape
    d_rows = d_rows.astype(jnp.float32)
    layout = parallel.current()
    if layout is None:
        return jnp.zeros(shape, jnp.float32).at[tokens].add(d_rows).astype(table.dtype), _no_gradient(tokens)
    placed, table_spec = _lookup_specs(layout, table, tokens)
    summed = parallel.mesh_axes(placed)
    reduced = _reduced(layout.parameter("gradients", ("vocab", "embed"), shape), table_spec, summed)

    def local(d_rows, tokens):
        size = shape[0] // (layout.mesh.shape["tensor"] if "tensor" in parallel.mesh_axes(table_spec) else 1)
        place, inside = _local_places(size, tokens, table_spec)
        # Another device's rows go past the end, where they are dropped.
        add = jnp.zeros((size, shape[1]), jnp.float32).at[jnp.where(inside, place, size)].add(d_rows, mode="drop")
        return parallel.sum_over(add, reduced, summed)

    rows_spec = jax.sharding.PartitionSpec(*placed, None)
    table_gradient = jax.shard_map(local, mesh=layout.mesh, in_specs=(rows_spec, placed), out_specs=reduced)(
        d_rows, tokens
    )
    table_gradient = parallel.constrain_gradient(table_gradient, ("vocab", "embed"))
    return table_gradient.astype(table.dtype), _no_gradient(tokens)


def _reduced(gradient, gathered, summed):
    """The gradient's spec where what it is cut over beyond ``gathered`` is summed; else ``gathered``."""
    own = set(parallel.mesh_axes(gradient)) - set(parallel.mesh_axes(gathered))
    return gradient if own <= set(summed) else gathered


def _no_gradient(tokens):
    return np.zeros(tokens.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)
