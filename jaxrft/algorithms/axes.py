"""Sums over the devices of a named axis, inside ``jax.pmap`` and ``jax.shard_map``.

A loss is a sum over rows. With the rows spread over devices, the value must be the sum over all of them and the
gradient of each device's rows must be theirs alone. A plain ``psum`` has the second property only where JAX tracks
which values vary over the axis (``shard_map`` as it is by default): there its transpose is the identity. In ``pmap``
its transpose is another ``psum``, which would multiply the gradient by the size of the axis.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AxisName = str | tuple[str, ...]


def loss_sum(value: Float[Array, ""], axis_name: AxisName | None) -> Float[Array, ""]:
    """The sum over the axis, of which each device differentiates its own term; ``value`` without an axis."""
    if axis_name is None:
        return value
    if _varies(axis_name):
        return jax.lax.psum(value, axis_name)
    return _sum_of_terms(value, axis_name)


def axis_sum(value: Array, axis_name: AxisName | None) -> Array:
    """The sum over the axis as a part of the calculation: its gradient collects what all devices make of it."""
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def axis_max(value: Array, axis_name: AxisName | None) -> Array:
    """The largest over the axis."""
    return value if axis_name is None else jax.lax.pmax(value, axis_name)


def all_rows(array: Array, axis_name: AxisName | None) -> Array:
    """The rows of all devices, [global batch, ...], in the order of the axis."""
    return array if axis_name is None else jax.lax.all_gather(array, axis_name, tiled=True)


def own_rows(array: Array, rows: int, axis_name: AxisName | None) -> Array:
    """This device's ``rows`` of what :func:`all_rows` gave."""
    if axis_name is None:
        return array
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axis_name) * rows, rows)


def _varies(axis_name: AxisName) -> bool:
    """Whether JAX tracks what varies over the axis: the index along it varies by its nature."""
    return bool(jax.typeof(jax.lax.axis_index(axis_name)).mat.varying)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_of_terms(value: Float[Array, ""], axis_name: AxisName) -> Float[Array, ""]:
    return jax.lax.psum(value, axis_name)


def _forward(value: Float[Array, ""], axis_name: AxisName) -> tuple[Float[Array, ""], None]:
    return _sum_of_terms(value, axis_name), None


def _backward(axis_name: AxisName, _: None, cotangent: Float[Array, ""]) -> tuple[Float[Array, ""]]:
    return (jnp.asarray(cotangent),)


_sum_of_terms.defvjp(_forward, _backward)
