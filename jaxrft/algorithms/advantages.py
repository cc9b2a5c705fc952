"""Advantages from the rewards of groups of completions."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrft.algorithms.choices import require_choice

Baseline = Literal["mean", "leave_one_out", "length", "greedy", "batch_mean", "none"]
Scale = Literal["std", "batch_std", "mean", "none"]

Samples = Float[Array, "samples"]
Ids = Int[Array, "samples"]


def group_advantages(
    rewards: Samples,
    group_ids: Ids,
    num_groups: int,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: float = 1e-6,
    *,
    lengths: Samples | None = None,
    greedy_rewards: Float[Array, "groups"] | None = None,
) -> Samples:
    """How much better each sample did than its group.

    GRPO (arXiv:2402.03300) is ``mean`` and ``std``; Dr.GRPO (arXiv:2503.20783) is ``mean`` and ``none``; RLOO
    (arXiv:2402.14740) is ``leave_one_out`` and ``none``; OPO (arXiv:2505.23585) is ``length`` and ``none``; ReMax
    (arXiv:2310.10505) is ``greedy`` and ``none``; MaxRL (arXiv:2602.02710) is ``mean`` and ``mean``.

    Args:
        rewards: one a sample, finite; or NaN where none applies: it counts nowhere and its advantage is 0.
        group_ids: group of each sample, from 0 to ``num_groups`` - 1; groups may differ in size.
        num_groups: static.
        baseline: subtracted: the mean of the group, of the group's others, of the group weighted by ``lengths``, or
            of the whole batch; the group's ``greedy_rewards``; or nothing.
        scale: divisor: standard deviation (n - 1) of the group or of the whole batch, plus ``eps``; the mean of the
            group plus ``eps``, for rewards that are never negative; or 1. Where all those rewards are equal, or there
            is but one, a standard deviation counts as 1; with a mean that is not positive the advantages are 0.
        eps: keeps the divisor away from 0.
        lengths: tokens of each sample, for the baseline ``length``.
        greedy_rewards: reward of each group's greedy completion, for the baseline ``greedy``; NaN where none
            applies, and the group's advantages are 0.

    Returns:
        Advantages; with a baseline from the group, exactly 0 in a group of one and in a group of equal rewards.

    Raises:
        ValueError: unknown baseline or scale, or what the baseline needs is missing.
    """
    require_choice("baseline", baseline, get_args(Baseline))
    require_choice("scale", scale, get_args(Scale))
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = ~jnp.isnan(rewards)
    if baseline == "greedy":
        if greedy_rewards is None:
            raise ValueError("greedy_rewards: needed with the baseline greedy")
        result = rewards - jnp.asarray(greedy_rewards, jnp.float32)[group_ids]
        result = jnp.where(jnp.isnan(result), 0.0, result)
    elif baseline == "none":
        result = jnp.where(valid, rewards, 0.0)
    elif baseline == "batch_mean":
        result = _less_mean(rewards, valid.astype(jnp.float32), jnp.zeros_like(group_ids), 1)
    else:
        result = _less_group(rewards, valid, group_ids, num_groups, baseline, lengths)
    return result / _divisor(rewards, valid, group_ids, num_groups, scale, eps)


def multi_reward_advantages(
    components: Float[Array, "samples rewards"],
    weights: Float[Array, "rewards"],
    group_ids: Ids,
    num_groups: int,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: float = 1e-6,
    *,
    lengths: Samples | None = None,
    greedy_components: Float[Array, "groups rewards"] | None = None,
) -> Samples:
    """The weighted sum of each reward's own advantages (GDPO, arXiv:2601.05242).

    Rewards of different spread then count by their weights alone. The paper whitens the sums over the batch; see
    :func:`~jaxrft.algorithms.returns.whiten`.

    Args:
        components: each reward of each sample; NaN where it does not apply: its advantage is 0.
        weights: of each reward.
        greedy_components: each reward of each group's greedy completion, for the baseline ``greedy``.
        group_ids, num_groups, baseline, scale, eps, lengths: as for :func:`group_advantages`.
    """

    def one(rewards: Samples, greedy: Float[Array, "groups"] | None) -> Samples:
        return group_advantages(
            rewards, group_ids, num_groups, baseline, scale, eps, lengths=lengths, greedy_rewards=greedy
        )

    each = jax.vmap(one, in_axes=(1, None if greedy_components is None else 1), out_axes=1)
    return each(jnp.asarray(components), greedy_components) @ jnp.asarray(weights, jnp.float32)


def informative_weight(rewards: Samples, group_ids: Ids, num_groups: int, cap: float | None = None) -> Float[Array, ""]:
    """Samples over those in groups whose rewards differ: what makes up for the groups without a gradient.

    GPG's alpha (arXiv:2504.02546) and, with a ``cap`` of 3, CPGD's clip-filter-like weight (arXiv:2505.12504). 1 where
    all groups are alike.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = ~jnp.isnan(rewards)
    differs = _spread(rewards, valid, group_ids, num_groups)[group_ids] > 0
    total, informative = jnp.sum(valid), jnp.sum(valid & differs)
    weight = jnp.where(informative > 0, total / jnp.maximum(informative, 1), 1.0)
    return weight if cap is None else jnp.minimum(weight, cap)


def _less_group(
    rewards: Samples,
    valid: Bool[Array, "samples"],
    group_ids: Ids,
    num_groups: int,
    baseline: Baseline,
    lengths: Samples | None,
) -> Samples:
    """Rewards less a baseline that the group itself gives."""
    share = valid.astype(jnp.float32)
    if baseline == "length":
        if lengths is None:
            raise ValueError("lengths: needed with the baseline length")
        share = jnp.where(valid, jnp.asarray(lengths, jnp.float32), 0.0)
    centred = _less_mean(rewards, share, group_ids, num_groups)
    if baseline == "leave_one_out":
        count = jax.ops.segment_sum(share, group_ids, num_groups)
        centred = centred * (count / jnp.maximum(count - 1.0, 1.0))[group_ids]
    return centred


def _less_mean(rewards: Samples, share: Samples, group_ids: Ids, num_groups: int) -> Samples:
    """Rewards less the mean of their group, weighted by ``share``; 0 where they are NaN."""
    # Rewards are measured from the lowest of the group: the mean of numbers like 0.1 rounds, the mean of
    # zeros does not, so equal rewards are exactly 0, and a large common part costs no precision.
    valid = ~jnp.isnan(rewards)
    lowest = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), group_ids, num_groups)
    above = jnp.where(valid, rewards - lowest[group_ids], 0.0)
    total = jax.ops.segment_sum(share, group_ids, num_groups)
    mean = jax.ops.segment_sum(above * share, group_ids, num_groups) / jnp.where(total > 0, total, 1.0)
    return jnp.where(valid & (total > 0)[group_ids], above - mean[group_ids], 0.0)


def _divisor(
    rewards: Samples, valid: Bool[Array, "samples"], group_ids: Ids, num_groups: int, scale: Scale, eps: float
) -> Samples:
    """What each sample's advantage is divided by."""
    if scale == "none":
        return jnp.ones_like(rewards)
    share = valid.astype(jnp.float32)
    if scale == "mean":
        total, count = (jax.ops.segment_sum(a, group_ids, num_groups) for a in (jnp.where(valid, rewards, 0.0), share))
        mean = total / jnp.maximum(count, 1.0)
        return jnp.where(mean > 0, mean + eps, jnp.inf)[group_ids]
    ids, number = (group_ids, num_groups) if scale == "std" else (jnp.zeros_like(group_ids), 1)
    count = jax.ops.segment_sum(share, ids, number)
    squares = jax.ops.segment_sum(jnp.square(_less_mean(rewards, share, ids, number)), ids, number)
    varied = squares > 0
    variance = jnp.where(varied, squares, 1.0) / jnp.maximum(count - 1.0, 1.0)
    return jnp.where(varied, jnp.sqrt(variance) + eps, 1.0)[ids]


def _spread(rewards: Samples, valid: Bool[Array, "samples"], group_ids: Ids, num_groups: int) -> Float[Array, "groups"]:
    """Highest less lowest reward of each group; negative where none is valid."""
    high = jax.ops.segment_max(jnp.where(valid, rewards, -jnp.inf), group_ids, num_groups)
    low = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), group_ids, num_groups)
    return high - low
