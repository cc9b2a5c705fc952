"""Objectives that are made of whole responses: every token of a row gets the row's loss or weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.axes import axis_sum
from jaxrft.algorithms.divergence import clamp_log_ratio
from jaxrft.algorithms.levels import sequence_mean, sequence_sum
from jaxrft.algorithms.surrogates import Inputs, Tokens, TokenStats, clip

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective


def luspo(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """GSPO's loss times the length of the response, so that none is favoured for being short (arXiv:2602.05261)."""
    losses, stats = clip(objective, x)
    return losses * jnp.sum(x.mask, axis=-1, keepdims=True), stats


def vespo(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """REINFORCE with a smooth weight of the whole response's ratio W (VESPO, arXiv:2602.10693).

    The weight is exp(l + k log W - l W), with its shape (k, l) by the sign of the advantage: 1 where W is 1, and 0
    far from it.
    """
    log_ratio = jax.lax.stop_gradient(clamp_log_ratio(sequence_sum(x.log_ratio, x.mask)))
    positive = x.advantages >= 0
    k, rate = (jnp.where(positive, p, n) for p, n in zip(objective.vespo_positive, objective.vespo_negative))
    weight = jnp.exp(rate + k * log_ratio - rate * jnp.exp(log_ratio))
    return -weight * x.advantages * x.logprobs, {"vespo/weight_mean": weight}


def gvpo(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """Half the squared gap between implied and given rewards, both centred in their group (GVPO, arXiv:2504.19599).

    The implied reward of a response is ``gvpo_coef`` times its summed log-ratio. A row without valid tokens counts
    nowhere.
    """
    implied = objective.gvpo_coef * clamp_log_ratio(jnp.sum(x.log_ratio * x.mask, axis=-1))
    given = sequence_mean(x.advantages, x.mask)[:, 0]
    gap = _centred(implied, x) - _centred(given, x)
    losses = jnp.broadcast_to(0.5 * jnp.square(gap)[:, None], x.mask.shape)
    return losses, {"gvpo/implied_reward_mean": jnp.broadcast_to(implied[:, None], x.mask.shape)}


def _centred(values: Float[Array, "batch"], x: Inputs) -> Float[Array, "batch"]:
    """Less the mean over the group's rows that have valid tokens, on all devices."""
    counted = jnp.max(x.mask, axis=-1, initial=0.0)
    groups = jnp.zeros(values.shape, jnp.int32) if x.group_ids is None else x.group_ids
    total, count = (
        axis_sum(jax.ops.segment_sum(array, groups, x.num_groups), x.axis_name) for array in (values * counted, counted)
    )
    return (values - (total / jnp.maximum(count, 1.0))[groups]) * counted
