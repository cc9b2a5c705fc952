"""The levels of the importance ratio: of a token, or of a whole response."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

Tokens = Float[Array, "batch time"]
Level = Literal["token", "sequence", "sequence_token", "geometric"]


def sequence_sum(values: Tokens, mask: Tokens) -> Tokens:
    """Sum over the valid tokens of each row, at all of its places."""
    return jnp.broadcast_to(jnp.sum(values * mask, axis=-1, keepdims=True), values.shape)


def sequence_mean(values: Tokens, mask: Tokens) -> Tokens:
    """Mean over the valid tokens of each row, at all of its places; 0 in a row without any."""
    return sequence_sum(values, mask) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)


def _token(objective: PolicyObjective, log_ratio: Tokens, advantages: Tokens, mask: Tokens) -> Tokens:
    return log_ratio


def _sequence(objective: PolicyObjective, log_ratio: Tokens, advantages: Tokens, mask: Tokens) -> Tokens:
    return sequence_mean(log_ratio, mask)


def _sequence_token(objective: PolicyObjective, log_ratio: Tokens, advantages: Tokens, mask: Tokens) -> Tokens:
    mean = jax.lax.stop_gradient(sequence_mean(log_ratio, mask))
    return mean + (log_ratio - jax.lax.stop_gradient(log_ratio))


def _geometric(objective: PolicyObjective, log_ratio: Tokens, advantages: Tokens, mask: Tokens) -> Tokens:
    return sequence_mean(clip_log_ratio(objective, log_ratio, advantages), mask)


def clip_log_ratio(objective: PolicyObjective, log_ratio: Tokens, advantages: Tokens) -> Tokens:
    """GMPO's clipping of a token: its log-ratio has one bound, on the side that the advantage pushes it to."""
    low, high = -objective.clip_low, objective.upper
    above, below = (advantages > 0) & (log_ratio > high), (advantages <= 0) & (log_ratio < low)
    return jnp.where(above, high, jnp.where(below, low, log_ratio))


LEVELS: dict[Level, Callable[..., Tokens]] = {
    "token": _token,
    "sequence": _sequence,
    "sequence_token": _sequence_token,
    "geometric": _geometric,
}
"""What ``PolicyObjective.level`` names: log-ratios of the level, from the objective, the tokens' log-ratios (0 where
masked), advantages and mask.
"""
