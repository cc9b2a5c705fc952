"""Stochastic rounding to bfloat16 (arXiv:2010.06192)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stochastic_round(key: jax.Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` in bfloat16, rounded up or down with probabilities that make its mean ``x``.

    Updates that are far smaller than the distance of two bfloat16 numbers then count on average, where rounding to
    the nearest would drop every one of them. Values that are not finite stay what they are.

    Args:
        key: a random key.
        x: float32.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 is the upper half of float32: what overflows from the lower half rounds away from zero.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + noise
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def cast_like(key: jax.Array, values: Any, like: Any) -> Any:
    """A tree of float32 arrays in the types of ``like``: bfloat16 by stochastic rounding."""
    leaves, treedef = jax.tree.flatten(values)
    cast = [
        stochastic_round(jax.random.fold_in(key, index), value)
        if old.dtype == jnp.bfloat16
        else value.astype(old.dtype)
        for index, (value, old) in enumerate(zip(leaves, jax.tree.leaves(like)))
    ]
    return jax.tree.unflatten(treedef, cast)
