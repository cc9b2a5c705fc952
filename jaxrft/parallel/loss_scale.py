"""Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LARGEST_SCALE = 2.0**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
    """What the loss is multiplied with, so that small gradients do not vanish in float16.

    Attributes:
        value: the factor.
        good_steps: steps since it last changed.
    """

    value: Float[Array, ""]
    good_steps: Int[Array, ""]


def initial_loss_scale(value: float) -> LossScale:
    """The scale before the first step."""
    return LossScale(value=jnp.float32(value), good_steps=jnp.int32(0))


def adjust(scale: LossScale, finite: Bool[Array, ""], growth_steps: int) -> LossScale:
    """The scale after a step: halved (to 1 at least) at an overflow, doubled after ``growth_steps`` without one."""
    good = jnp.where(finite, scale.good_steps + 1, 0)
    grows = good >= growth_steps
    grown = jnp.where(grows, jnp.minimum(scale.value * 2, LARGEST_SCALE), scale.value)
    value = jnp.where(finite, grown, jnp.maximum(scale.value / 2, 1.0))
    return LossScale(value=value, good_steps=jnp.where(grows, 0, good))
