"""Policy objectives: one typed description, and one function that evaluates it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.divergence import KLKind, clamp_log_ratio, kl
from jaxrft.algorithms.reductions import Reduction, Totals, token_weights, totals

Stats = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A policy objective as data; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        objective: ``clip``, the clipped surrogate of PPO (arXiv:1707.06347).
        level: ``token``: every token has its own ratio; ``sequence``: all tokens of a response share the
            exponential of its mean log-ratio (GSPO, arXiv:2507.18071).
        clip_low: ratios are clipped at 1 - clip_low.
        clip_high: and at 1 + clip_high; None: clip_low, as in PPO.
        dual_clip: for negative advantages the loss is at most this many times |advantage|
            (arXiv:1912.09729); None: no bound.
        reduction: see :func:`~jaxrft.algorithms.reductions.token_weights`.
        constant_length: divisor of the reduction ``constant``.
        kl_coef: weight of the KL to the reference; 0 needs no reference.
        kl_kind: its estimator, see :func:`~jaxrft.algorithms.divergence.kl`.
    """

    objective: Literal["clip"] = "clip"
    level: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    reduction: Reduction = "token_mean"
    constant_length: int | None = None
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"


def policy_loss(
    objective: PolicyObjective,
    logprobs: Float[Array, "batch time"],
    old_logprobs: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"] | Float[Array, "batch"],
    mask: Float[Array, "batch time"],
    *,
    ref_logprobs: Float[Array, "batch time"] | None = None,
    whole: Totals | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """The loss to minimise, and what it looked like.

    Args:
        objective: the description.
        logprobs: log-probabilities of the sampled tokens under the policy; gradients flow through these.
        old_logprobs: the same before the first update on these samples.
        advantages: of each token, or of each sequence.
        mask: 1 for tokens that count, 0 elsewhere; holes and empty rows are allowed.
        ref_logprobs: under the reference; needed where ``kl_coef`` is above 0.
        whole: counts of the whole batch where these rows are a part of it: the losses and mean
            statistics of all parts then add up to those of the batch.

    Returns:
        The loss, and statistics: means over tokens, but for those that end in ``max`` or ``min``;
        :func:`merge_stats` merges those of several parts.

    Raises:
        ValueError: ``kl_coef`` is above 0 and there are no ``ref_logprobs``.
    """
    mask = mask.astype(jnp.float32)
    whole = totals(mask) if whole is None else whole
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    # Masked places may hold anything, infinities too; a zero weight alone would leave NaN gradients there.
    log_ratio = clamp_log_ratio(jnp.where(mask > 0, logprobs - old_logprobs, 0.0))
    level_log_ratio = _sequence_log_ratio(log_ratio, mask) if objective.level == "sequence" else log_ratio
    ratio = jnp.exp(level_log_ratio)
    losses, stats = _clip_loss(objective, ratio, jnp.broadcast_to(advantages, ratio.shape))
    if objective.kl_coef > 0:
        if ref_logprobs is None:
            raise ValueError("ref_logprobs: needed where kl_coef is above 0")
        penalty = kl(jnp.where(mask > 0, logprobs, 0.0), jnp.where(mask > 0, ref_logprobs, 0.0), objective.kl_kind)
        losses = losses + objective.kl_coef * penalty
        stats["kl"] = penalty
    weights = token_weights(mask, objective.reduction, whole, objective.constant_length)
    return jnp.sum(losses * weights), _reduce_stats(stats, log_ratio, ratio, mask, whole)


def _sequence_log_ratio(log_ratio, mask):
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    mean = jnp.sum(log_ratio * mask, axis=-1, keepdims=True) / lengths
    return jnp.broadcast_to(mean, log_ratio.shape)


def _clip_loss(objective, ratio, advantages):
    low, high = objective.clip_low, objective.clip_low if objective.clip_high is None else objective.clip_high
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    is_low = (ratio < 1.0 - low) & (advantages < 0)
    is_high = (ratio > 1.0 + high) & (advantages > 0)
    stats = {
        "clip_ratio/low_mean": is_low.astype(jnp.float32),
        "clip_ratio/high_mean": is_high.astype(jnp.float32),
        "clip_ratio/region_mean": (is_low | is_high).astype(jnp.float32),
    }
    if objective.dual_clip is not None:
        bound = -advantages * objective.dual_clip
        stats["clip_ratio/dual_mean"] = ((advantages < 0) & (losses > bound)).astype(jnp.float32)
        losses = jnp.where(advantages < 0, jnp.minimum(losses, bound), losses)
    return losses, stats


def _reduce_stats(stats, log_ratio, ratio, mask, whole):
    stats = stats | {
        "ratio/mean": ratio,
        "ratio/deviation_mean": jnp.abs(jnp.expm1(log_ratio)),
        "policy_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    share = mask / jnp.maximum(whole.tokens, 1.0)
    reduced = {name: jnp.sum(jax.lax.stop_gradient(value) * share) for name, value in stats.items()}
    deviation = jax.lax.stop_gradient(jnp.abs(jnp.expm1(log_ratio))) * mask
    return reduced | {"ratio/deviation_max": jnp.max(deviation, initial=0.0)}


def merge_stats(parts: Mapping[str, Float[Array, "parts"]]) -> Stats:
    """Statistics of a batch from those of its parts, stacked: maxima and minima by name, all others added."""
    merge = {"max": jnp.max, "min": jnp.min}
    return {name: merge.get(name[-3:], jnp.sum)(values, axis=0) for name, values in parts.items()}
