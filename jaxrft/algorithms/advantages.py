"""Advantages from the rewards of groups of completions."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
        rewards: one a sample; NaN where none applies: it counts nowhere and its advantage is 0.
        group_ids: group of each sample, from 0 to ``num_groups`` - 1; groups may differ in size.
        num_groups: static.
        baseline: subtracted: mean of the group, mean of the group's others, or nothing.
        scale: divisor: standard deviation (n - 1) of the group or of the batch, plus ``eps``, or 1.

    Returns:
        Advantages, exactly 0 in a group of one and in a group of equal rewards unless ``baseline`` is ``none``.

    Raises:
        ValueError: unknown baseline or scale.
    """
    valid = ~jnp.isnan(rewards)
    values = jnp.where(valid, rewards, 0.0).astype(jnp.float32)
    count = _group_sum(valid.astype(jnp.float32), group_ids, num_groups)
    mean = _group_sum(values, group_ids, num_groups) / jnp.maximum(count, 1.0)
    centred = jnp.where(valid, values - mean[group_ids], 0.0)
    centred = jnp.where(_spread(values, valid, group_ids, num_groups)[group_ids] > 0, centred, 0.0)
    result = _subtract_baseline(values, centred, count[group_ids], baseline)
    return jnp.where(valid, result / _divisor(centred, values, valid, count, group_ids, num_groups, scale, eps), 0.0)


def _group_sum(values, group_ids, num_groups):
    return jax.ops.segment_sum(values, group_ids, num_groups)


def _spread(values, valid, group_ids, num_groups):
    """Largest minus smallest reward of each group: 0 tells equal rewards apart from rounding in the mean."""
    high = jax.ops.segment_max(jnp.where(valid, values, -jnp.inf), group_ids, num_groups)
    low = jax.ops.segment_min(jnp.where(valid, values, jnp.inf), group_ids, num_groups)
    return jnp.where(jnp.isfinite(high) & jnp.isfinite(low), high - low, 0.0)


def _subtract_baseline(values, centred, count, baseline):
    if baseline == "mean":
        return centred
    if baseline == "leave_one_out":
        return centred * count / jnp.maximum(count - 1.0, 1.0)
    if baseline == "none":
        return values
    raise ValueError(f"baseline: got {baseline!r}, takes mean, leave_one_out or none")


def _divisor(centred, values, valid, count, group_ids, num_groups, scale, eps):
    if scale == "std":
        variance = _group_sum(jnp.square(centred), group_ids, num_groups) / jnp.maximum(count - 1.0, 1.0)
        return jnp.sqrt(variance)[group_ids] + eps
    if scale == "batch_std":
        total = jnp.sum(valid)
        mean = jnp.sum(values) / jnp.maximum(total, 1)
        squares = jnp.where(valid, jnp.square(values - mean), 0.0)
        return jnp.sqrt(jnp.sum(squares) / jnp.maximum(total - 1, 1)) + eps
    if scale == "none":
        return jnp.ones_like(centred)
    raise ValueError(f"scale: got {scale!r}, takes std, batch_std or none")
