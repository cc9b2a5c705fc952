"""Advantages from the rewards of groups of completions."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrft.algorithms.choices import require_choice

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "batch_std", "none"]


def group_advantages(
    rewards: Float[Array, "samples"],
    group_ids: Int[Array, "samples"],
    num_groups: int,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: float = 1e-6,
) -> Float[Array, "samples"]:
    """How much better each sample did than its group.

    GRPO (arXiv:2402.03300) is ``mean`` and ``std``; Dr.GRPO (arXiv:2503.20783) is ``mean`` and ``none``;
    RLOO (arXiv:2402.14740) is ``leave_one_out`` and ``none``.

    Args:
        rewards: one a sample, finite; or NaN where none applies: it counts nowhere and its advantage is 0.
        group_ids: group of each sample, from 0 to ``num_groups`` - 1; groups may differ in size.
        num_groups: static.
        baseline: subtracted: mean of the group, mean of the group's others, or nothing.
        scale: divisor: standard deviation (n - 1) of the group or of the whole batch, plus ``eps``; or 1. Where
            all those rewards are equal, or there is but one, it is 1.
        eps: keeps the divisor away from 0.

    Returns:
        Advantages, exactly 0 in a group of one and in a group of equal rewards unless ``baseline`` is ``none``.

    Raises:
        ValueError: unknown baseline or scale.
    """
    require_choice("baseline", baseline, get_args(Baseline))
    require_choice("scale", scale, get_args(Scale))
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = ~jnp.isnan(rewards)
    count, centred = _centred(rewards, valid, group_ids, num_groups)
    result = centred
    if baseline == "leave_one_out":
        result = centred * (count / jnp.maximum(count - 1.0, 1.0))[group_ids]
    elif baseline == "none":
        result = jnp.where(valid, rewards, 0.0)
    if scale == "std":
        result = result / _deviation(centred, count, group_ids, num_groups, eps)
    elif scale == "batch_std":
        batch = jnp.zeros_like(group_ids)
        count, centred = _centred(rewards, valid, batch, 1)
        result = result / _deviation(centred, count, batch, 1, eps)
    return result


def _centred(
    rewards: Float[Array, "samples"], valid: Bool[Array, "samples"], group_ids: Int[Array, "samples"], num_groups: int
) -> tuple[Float[Array, "groups"], Float[Array, "samples"]]:
    """Size of each group, and rewards less the mean of their group; 0 where not valid."""
    count = jax.ops.segment_sum(valid.astype(jnp.float32), group_ids, num_groups)
    # Rewards are measured from the lowest of the group: the mean of numbers like 0.1 rounds, the mean of
    # zeros does not, so equal rewards are exactly 0, and a large common part costs no precision.
    lowest = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), group_ids, num_groups)
    above = jnp.where(valid, rewards - lowest[group_ids], 0.0)
    mean = jax.ops.segment_sum(above, group_ids, num_groups) / jnp.maximum(count, 1.0)
    return count, jnp.where(valid, above - mean[group_ids], 0.0)


def _deviation(
    centred: Float[Array, "samples"],
    count: Float[Array, "groups"],
    group_ids: Int[Array, "samples"],
    num_groups: int,
    eps: float,
) -> Float[Array, "samples"]:
    """Standard deviation (n - 1) of each sample's group plus ``eps``; 1 where it is 0."""
    squares = jax.ops.segment_sum(jnp.square(centred), group_ids, num_groups)
    varied = squares > 0
    variance = jnp.where(varied, squares, 1.0) / jnp.maximum(count - 1.0, 1.0)
    return jnp.where(varied, jnp.sqrt(variance) + eps, 1.0)[group_ids]
