"""The function that evaluates any policy objective."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxrft.algorithms.axes import AxisName, axis_max, axis_sum, loss_sum
from jaxrft.algorithms.corrections import correction_weights, sequences_on_policy
from jaxrft.algorithms.divergence import clamp_log_ratio, kl
from jaxrft.algorithms.levels import LEVELS, Tokens
from jaxrft.algorithms.objectives import SURROGATES, PolicyObjective
from jaxrft.algorithms.reductions import Reduction, Totals, token_weights, totals
from jaxrft.algorithms.selection import Selection, token_selection
from jaxrft.algorithms.surrogates import Inputs, TokenStats

Stats = dict[str, Float[Array, ""]]


def policy_loss(
    objective: PolicyObjective,
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens | Float[Array, "batch"],
    mask: Tokens,
    sampler_logprobs: Tokens | None = None,
    entropies: Tokens | None = None,
    ref_logprobs: Tokens | None = None,
    axis_name: AxisName | None = None,
    key: PRNGKeyArray | None = None,
    *,
    group_ids: Int[Array, "batch"] | None = None,
    num_groups: int | None = None,
    kl_coef: Float[Array, ""] | float | None = None,
    whole: Totals | None = None,
    selection: Selection | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """The loss to minimise, and what it looked like.

    In this order: the objective's loss of each token; times the correction's weights; 0 for rows that have left their
    sampler, and for tokens of low entropy, where the objective says so; plus the KL to the reference; then reduced.
    Where the mask is 0 the arrays may hold anything, infinities and NaN too. Log-ratios, and sums of them, are clamped
    to +-20.

    Args:
        objective: the description.
        logprobs: log-probabilities of the sampled tokens under the policy; gradients flow through these alone.
        old_logprobs: the same before the first update on these samples.
        advantages: of each token, or of each sequence.
        mask: 1 for tokens that count, 0 elsewhere; holes and empty rows are allowed.
        sampler_logprobs: the engine's; needed with ``correction`` and ``sequence_mask``.
        entropies: of the policy at each token; needed with ``entropy_share``.
        ref_logprobs: under the reference; needed, and read, where ``kl_coef`` is above 0.
        axis_name: mapped axis (of ``jax.pmap`` or ``jax.shard_map``) that the rows are spread over. Loss and statistics
            are then those of all rows, the gradient is that of the device's own rows. Under ``jax.pmap``
            differentiate inside; under ``jax.shard_map`` inside or outside. ``check_vma=False`` is not supported: JAX
            then does not say which of the two this is, and a gradient taken outside would be wrong by the axis' size.
        key: for objectives that draw at random (``clip_cov``).
        group_ids: group of each row, from 0 to ``num_groups`` - 1, for ``gvpo``; None: all rows are one group.
        num_groups: static; needed with ``group_ids``.
        kl_coef: in place of the objective's; may be traced.
        whole: counts of the whole batch where these rows are a part of it: the losses and mean
            statistics of all parts then add up to those of the batch.
        selection: of these rows, where they are a part of a batch: see :func:`token_selection`.

    Returns:
        The loss, and statistics: means over tokens (over sequences for those of the ratio and of the objective where
        the level is not ``token``), but for those that end in ``max`` or ``min``; :func:`merge_stats` merges those of
        several parts.

    Raises:
        ValueError: something that the objective needs is missing, or shapes differ.
    """
    mask = mask.astype(jnp.float32)
    if group_ids is not None and num_groups is None:
        raise ValueError("num_groups: needed with group_ids")
    if entropies is not None:
        entropies = _valid("entropies", entropies, mask)
    x = _inputs(objective, logprobs, old_logprobs, advantages, mask)
    x = x._replace(group_ids=group_ids, num_groups=num_groups or 1, axis_name=axis_name)
    if objective.selects and selection is None:
        selection = token_selection(
            objective, x.logprobs, x.old_logprobs, x.advantages, mask, entropies=entropies, key=key, axis_name=axis_name
        )
    x = x._replace(chosen=selection.chosen if selection else None)
    losses, level_stats = SURROGATES[objective.objective].loss(objective, x)
    level_stats["ratio/mean"] = x.ratio
    weights, token_stats = _weights(objective, x, sampler_logprobs, selection)
    losses = losses * weights
    deviation = jnp.abs(jnp.expm1(x.log_ratio))
    token_stats |= {"ratio/deviation_mean": deviation, "policy_kl": kl(x.old_logprobs, x.logprobs)}
    if objective.kl_coef > 0 or kl_coef is not None:
        token_stats["kl"], estimate = _reference_kl(objective, x, ref_logprobs)
        losses = losses + (objective.kl_coef if kl_coef is None else kl_coef) * estimate
    if whole is None:
        whole = totals(mask, axis_name)
    loss = loss_sum(
        jnp.sum(losses * token_weights(mask, objective.reduction, whole, objective.constant_length)), axis_name
    )
    level_reduction: Reduction = "token_mean" if objective.level == "token" else "sequence_mean"
    stats = _means(level_stats, token_weights(mask, level_reduction, whole), axis_name)
    stats |= _means(token_stats, token_weights(mask, "token_mean", whole), axis_name)
    largest = axis_max(jax.lax.stop_gradient(jnp.max(deviation, initial=0.0)), axis_name)
    return loss, stats | {"ratio/deviation_max": largest}


def merge_stats(parts: Mapping[str, Float[Array, "parts"]]) -> Stats:
    """Statistics of a batch from those of its parts, stacked: maxima and minima by name, all others added."""
    merge = {"max": jnp.max, "min": jnp.min}
    return {name: merge.get(name[-3:], jnp.sum)(values, axis=0) for name, values in parts.items()}


def _inputs(
    objective: PolicyObjective,
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens | Float[Array, "batch"],
    mask: Tokens,
) -> Inputs:
    logprobs = _valid("logprobs", logprobs, mask)
    old_logprobs = jax.lax.stop_gradient(_valid("old_logprobs", old_logprobs, mask))
    advantages = jax.lax.stop_gradient(_valid("advantages", advantages, mask))
    log_ratio = clamp_log_ratio(logprobs - old_logprobs)
    ratio = jnp.exp(LEVELS[objective.level](objective, log_ratio, advantages, mask))
    return Inputs(logprobs, old_logprobs, log_ratio, ratio, advantages, mask)


def _weights(
    objective: PolicyObjective, x: Inputs, sampler_logprobs: Tokens | None, selection: Selection | None
) -> tuple[Tokens, TokenStats]:
    """What each token's loss is multiplied with: corrections, and 0 where nothing is to be learnt."""
    weights = jnp.ones_like(x.mask)
    stats: TokenStats = {}
    if objective.correction != "none" or objective.sequence_mask is not None:
        if sampler_logprobs is None:
            raise ValueError("sampler_logprobs: needed with correction and with sequence_mask")
        sampler = jax.lax.stop_gradient(_valid("sampler_logprobs", sampler_logprobs, x.mask))
        if objective.correction != "none":
            weights, stats = correction_weights(objective, x.old_logprobs, sampler, x.mask)
        if objective.sequence_mask is not None:
            on_policy = sequences_on_policy(objective.sequence_mask, x.logprobs, sampler, x.advantages, x.mask)
            weights = weights * on_policy
            stats["sequence_mask/dropped_mean"] = 1.0 - on_policy
    if selection is not None and selection.kept is not None:
        weights = weights * selection.kept
        stats["entropy_share/kept_mean"] = selection.kept
    return weights, stats


def _reference_kl(objective: PolicyObjective, x: Inputs, ref_logprobs: Tokens | None) -> tuple[Tokens, Tokens]:
    """The estimate as it is reported, and as it stands in the loss."""
    if ref_logprobs is None:
        raise ValueError("ref_logprobs: needed where kl_coef is above 0")
    reference = jax.lax.stop_gradient(_valid("ref_logprobs", ref_logprobs, x.mask))
    estimate = kl(x.logprobs, reference, objective.kl_kind)
    return estimate, estimate * jnp.exp(x.log_ratio) if objective.kl_weighted else estimate


def _valid(name: str, array: Tokens | Float[Array, "batch"], mask: Tokens) -> Tokens:
    """Zeros at masked places: a weight of zero alone would make NaN of what stands there, in the gradient too.

    Raises:
        ValueError: another shape; in a batch of one, or of one token, nobody would see that it was broadcast.
    """
    shapes = [mask.shape, mask.shape[:1]] if name == "advantages" else [mask.shape]
    if array.shape not in shapes:
        raise ValueError(f"{name}: got shape {array.shape}, takes {' or '.join(map(str, shapes))}, as the mask has")
    return jnp.where(mask > 0, array[:, None] if array.ndim == 1 else array, 0.0)


def _means(stats: TokenStats, weights: Tokens, axis_name: AxisName | None) -> Stats:
    return {name: axis_sum(jnp.sum(jax.lax.stop_gradient(value) * weights), axis_name) for name, value in stats.items()}
