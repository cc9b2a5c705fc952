"""Corrections for samples that another policy drew: an engine's numbers are not the trainer's to the last digit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.divergence import clamp_log_ratio
from jaxrft.algorithms.levels import sequence_mean, sequence_sum

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

Tokens = Float[Array, "batch time"]
Correction = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "geometric"]


def correction_weights(
    objective: PolicyObjective, old_logprobs: Tokens, sampler_logprobs: Tokens, mask: Tokens
) -> tuple[Tokens, dict[str, Tokens]]:
    """Importance of each token: the trainer's probability over the engine's, limited.

    ``truncate`` limits the ratio to [correction_low, correction_high] (truncated importance sampling: Yao et al.
    2025, 'Your efficient RL framework secretly brings you off-policy RL training'); ``mask`` drops what is outside
    (IcePop; at the level of sequences, MIS). The ratio is that of the token, of the whole response (the product), or
    the geometric mean of the response's.

    Returns:
        Weights, through which no gradient flows, and statistics of every token.
    """
    log_ratio = jax.lax.stop_gradient(clamp_log_ratio(old_logprobs - sampler_logprobs))
    if objective.correction_level == "sequence":
        log_ratio = clamp_log_ratio(sequence_sum(log_ratio, mask))
    elif objective.correction_level == "geometric":
        log_ratio = sequence_mean(log_ratio, mask)
    ratio = jnp.exp(log_ratio)
    outside = (ratio < objective.correction_low) | (ratio > objective.correction_high)
    if objective.correction == "mask":
        weights = jnp.where(outside, 0.0, ratio)
    else:
        weights = jnp.clip(ratio, objective.correction_low, objective.correction_high)
    return weights, {"correction/weight_mean": weights, "correction/outside_mean": outside.astype(jnp.float32)}


def sequences_on_policy(
    threshold: float, logprobs: Tokens, sampler_logprobs: Tokens, advantages: Tokens, mask: Tokens
) -> Tokens:
    """1 for tokens to learn from; 0 where the advantage is negative and the row has drifted from its sampler.

    The off-policy sequence mask of DeepSeek-V3.2 (arXiv:2512.02556): drifted are rows whose mean log-probability
    under the policy is more than ``threshold`` below that under the sampler.
    """
    drift = sequence_mean(jax.lax.stop_gradient(clamp_log_ratio(sampler_logprobs - logprobs)), mask)
    return ((advantages >= 0) | (drift <= threshold)).astype(jnp.float32)
