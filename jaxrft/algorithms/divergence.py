"""Estimators of the KL divergence from the current policy to another (Schulman 2020, 'Approximating KL Divergence')."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

KLKind = Literal["k1", "k2", "k3"]

# Differences of log-probabilities are clamped to this before they are exponentiated: exp(20) is
# far outside any range of interest and still finite, with a finite gradient, in float32.
MAX_LOG_RATIO = 20.0


def clamp_log_ratio(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """A difference of log-probabilities limited to what float32 can exponentiate; no gradient outside."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl(
    logprobs: Float[Array, "batch time"], ref_logprobs: Float[Array, "batch time"], kind: KLKind = "k3"
) -> Float[Array, "batch time"]:
    """KL(policy || reference) at each token, estimated from samples of the policy.

    With d = logprobs - ref_logprobs: ``k1`` is d (unbiased, any sign), ``k2`` is d^2 / 2, ``k3`` is
    exp(-d) - 1 + d (unbiased, never negative). d is clamped to +-20 in the exponential.

    Args:
        logprobs: log-probabilities under the current policy.
        ref_logprobs: log-probabilities of the same tokens under the reference.
        kind: ``k1``, ``k2`` or ``k3``.

    Raises:
        ValueError: the kind is none of these.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        difference = clamp_log_ratio(difference)
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kind: got {kind!r}, takes k1, k2 or k3")
