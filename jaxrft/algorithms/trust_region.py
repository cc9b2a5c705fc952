"""Objectives that bound how far a policy moves by other means than the clipped ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrft.algorithms.surrogates import Inputs, Tokens, TokenStats

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

# The ratio that DPPO weights a token with is cut off here.
MAX_RATIO = 20.0
# Least probability of 'any other token': that of a token whose own rounds to 1.
_LEAST_REST = 1e-7


def dppo_tv(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """REINFORCE by importance, gated by how far the token's probability has moved (DPPO, arXiv:2602.04879).

    A token whose probability rose by more than ``clip_high`` is not pushed up, nor down one that fell by more than
    ``clip_low``.
    """
    moved = jnp.exp(x.logprobs) - jnp.exp(x.old_logprobs)
    return _gated(x, moved > objective.upper, moved < -objective.clip_low)


def dppo_kl(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """The same, gated by KL(old || new) between 'this token' and 'any other', beyond the same two bounds."""
    new, old = (jnp.minimum(array, 0.0) for array in (x.logprobs, x.old_logprobs))
    new_rest, old_rest = (jnp.maximum(-jnp.expm1(array), _LEAST_REST) for array in (new, old))
    divergence = jnp.exp(old) * (old - new) + old_rest * (jnp.log(old_rest) - jnp.log(new_rest))
    up, down = (new > old) & (divergence > objective.upper), (new < old) & (divergence > objective.clip_low)
    return _gated(x, up, down)


def _gated(x: Inputs, too_high: Array, too_low: Array) -> tuple[Tokens, TokenStats]:
    closed = jnp.where(x.advantages > 0, too_high, too_low).astype(jnp.float32)
    weight = jax.lax.stop_gradient(jnp.minimum(x.ratio, MAX_RATIO) * (1.0 - closed))
    return -weight * x.advantages * x.logprobs, {"trust_region/masked_mean": closed}


def dro(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """-A log p, and ``dro_coef`` times half the squared log-ratio (DRO, arXiv:2405.19107)."""
    penalty = 0.5 * jnp.square(x.log_ratio)
    return -x.advantages * x.logprobs + objective.dro_coef * penalty, {"dro/penalty_mean": penalty}
