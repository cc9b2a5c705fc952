"""The losses that policy objectives give to single tokens, before they are weighted and summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

Tokens = Float[Array, "batch time"]
TokenStats = dict[str, Tokens]
Surrogate = Callable[["PolicyObjective", Tokens, Tokens], tuple[Tokens, TokenStats]]
SurrogateName = Literal["clip"]


def clip(objective: PolicyObjective, ratio: Tokens, advantages: Tokens) -> tuple[Tokens, TokenStats]:
    """PPO's clipped surrogate (arXiv:1707.06347), with a bound for negative advantages where asked for.

    max(-A r, -A c) with c the ratio r clipped to [1 - clip_low, 1 + clip_high]; with a dual clip (arXiv:1912.09729)
    at most dual_clip |A| where A < 0.
    """
    low = objective.clip_low
    high = low if objective.clip_high is None else objective.clip_high
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    plain, bounded = -advantages * ratio, -advantages * clipped
    # Where the two are equal the gradient is the plain one's; a maximum would halve it, for instance at a
    # ratio of 1 where nothing above or below is allowed.
    losses = jnp.where(bounded > plain, bounded, plain)
    is_low = (ratio < 1.0 - low) & (advantages < 0)
    is_high = (ratio > 1.0 + high) & (advantages > 0)
    stats = {"low": is_low, "high": is_high, "region": is_low | is_high}
    if objective.dual_clip is not None:
        bound = -advantages * objective.dual_clip
        stats["dual"] = (advantages < 0) & (losses > bound)
        losses = jnp.where(stats["dual"], bound, losses)
    return losses, {f"clip_ratio/{name}_mean": value.astype(jnp.float32) for name, value in stats.items()}


SURROGATES: dict[SurrogateName, Surrogate] = {"clip": clip}
"""What ``PolicyObjective.objective`` names: functions of the objective, the ratio at its level and the advantages.

They give every token's loss, and statistics of every token.
"""
