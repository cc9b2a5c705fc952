"""Estimators of the KL divergence from the current policy to another (Schulman 2020, 'Approximating KL Divergence')."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.choices import require_choice

KLKind = Literal["k1", "k2", "k3", "k1+", "k3+"]

# Differences of log-probabilities are clamped to this before anything is made of them: exp(20) is
# far outside any range of interest and still finite, with a finite gradient, in float32.
MAX_LOG_RATIO = 20.0


def clamp_log_ratio(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """A difference of log-probabilities limited to what float32 can exponentiate; no gradient outside."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl(
    logprobs: Float[Array, "batch time"], ref_logprobs: Float[Array, "batch time"], kind: KLKind = "k3"
) -> Float[Array, "batch time"]:
    """KL(policy || reference) at each token, estimated from samples of the policy.

    With d = logprobs - ref_logprobs, clamped to +-20: ``k1`` is d (unbiased, any sign), ``k2`` is d^2 / 2,
    ``k3`` is exp(-d) - 1 + d (unbiased, never negative).

    As a loss only k2 has a gradient whose mean over the policy's samples is that of the divergence: k1's is 0, and
    k3's is that of the reversed divergence. ``k1+`` and ``k3+`` have the value of k1 and k3 and the gradient of k2.

    Args:
        logprobs: log-probabilities under the current policy.
        ref_logprobs: log-probabilities of the same tokens under the reference.
        kind: ``k1``, ``k2``, ``k3``, ``k1+`` or ``k3+``.

    Raises:
        ValueError: the kind is none of these.
    """
    require_choice("kind", kind, get_args(KLKind))
    difference = clamp_log_ratio(logprobs - ref_logprobs)
    if kind.endswith("+"):
        value = kl(logprobs, ref_logprobs, "k1" if kind == "k1+" else "k3")
        slope = 0.5 * jnp.square(difference)
        return jax.lax.stop_gradient(value - slope) + slope
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    return jnp.expm1(-difference) + difference
