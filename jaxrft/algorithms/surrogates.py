"""The losses that policy objectives give to single tokens, before they are weighted and summed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrft.algorithms.axes import AxisName
from jaxrft.algorithms.divergence import MAX_LOG_RATIO
from jaxrft.algorithms.levels import Level, Tokens, clip_log_ratio

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

TokenStats = dict[str, Tokens]


class Inputs(NamedTuple):
    """What a surrogate sees; zeros at masked places. Gradients flow through ``logprobs``, ``log_ratio``, ``ratio``.

    Attributes:
        logprobs, old_logprobs: of the policy now, and before the first update on these samples.
        log_ratio: their difference, clamped to +-20.
        ratio: of the objective's level.
        advantages: of each token.
        mask: 1 for valid tokens.
        chosen: tokens picked out by their covariance; None where the objective picks none.
        group_ids: group of each row, None for one group; ``num_groups`` of them.
        axis_name: of the devices that the rows are spread over.
    """

    logprobs: Tokens
    old_logprobs: Tokens
    log_ratio: Tokens
    ratio: Tokens
    advantages: Tokens
    mask: Tokens
    chosen: Tokens | None = None
    group_ids: Int[Array, "batch"] | None = None
    num_groups: int = 1
    axis_name: AxisName | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What a value of ``PolicyObjective.objective`` stands for.

    Attributes:
        loss: each token's loss and statistics, of the objective and its inputs.
        levels: the levels that it can be evaluated at; with one alone, the objective's field need not name it.
        fields: the fields of the objective that it reads, of those that not all objectives read.
        grouped: whether it compares the samples of a group, which must then be together.
    """

    loss: Callable[[PolicyObjective, Inputs], tuple[Tokens, TokenStats]]
    levels: tuple[Level, ...] = ("token",)
    fields: tuple[str, ...] = ()
    grouped: bool = False


def clip(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """PPO's clipped surrogate (arXiv:1707.06347), with a bound for large ratios where asked for.

    max(-A r, -A c) with c the ratio r clipped to [1 - clip_low, 1 + clip_high]; with a dual clip (arXiv:1912.09729)
    at most dual_clip |A| where A < 0; with a ratio cap (INTELLECT-2, arXiv:2505.07291) r is at most that in -A r.
    At the level ``geometric`` (GMPO, arXiv:2507.20673) the tokens are clipped before their mean is taken: -A r.
    """
    if objective.level == "geometric":
        clipped = clip_log_ratio(objective, x.log_ratio, x.advantages)
        return -x.advantages * x.ratio, _shares(low=clipped > x.log_ratio, high=clipped < x.log_ratio)
    ratio = x.ratio if objective.ratio_cap is None else jnp.minimum(x.ratio, objective.ratio_cap)
    plain = -x.advantages * ratio
    bounded = -x.advantages * jnp.clip(x.ratio, 1.0 - objective.clip_low, 1.0 + objective.upper)
    # Where the two are equal the gradient is the plain one's; a maximum would halve it, for instance at a
    # ratio of 1 where nothing above or below is allowed.
    losses = jnp.where(bounded > plain, bounded, plain)
    low, high = clipped_sides(objective, x.ratio, x.advantages)
    stats = {"low": low, "high": high}
    if objective.dual_clip is not None:
        bound = -x.advantages * objective.dual_clip
        stats["dual"] = (x.advantages < 0) & (losses > bound)
        losses = jnp.where(stats["dual"], bound, losses)
    if objective.ratio_cap is not None:
        stats["cap"] = (x.advantages < 0) & (x.ratio > objective.ratio_cap)
    return losses, _shares(**stats)


def cispo(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """REINFORCE weighted by the clipped ratio, through which no gradient flows (MiniMax-M1, arXiv:2506.13585)."""
    low, high = 1.0 - objective.clip_low, 1.0 + objective.upper
    weight = jax.lax.stop_gradient(jnp.clip(x.ratio, low, high))
    return -weight * x.advantages * x.logprobs, _shares(low=x.ratio < low, high=x.ratio > high)


def reinforce(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """-A log p: no ratio and no bound (Williams 1992; GPG, arXiv:2504.02546)."""
    return -x.advantages * x.logprobs, {}


def cpgd(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """The policy gradient clipped in the log-ratio, with a drift towards the old policy (arXiv:2505.12504).

    max(-A d, -A c) with c the log-ratio d clipped to [log(1 - clip_low), log(1 + clip_high)], plus ``drift_coef``
    times the drift. With a dual clip the first part is at most |A| log(dual_clip) where A < 0.
    """
    low = math.log1p(-objective.clip_low) if objective.clip_low < 1 else -MAX_LOG_RATIO
    high = math.log1p(objective.upper)
    plain, bounded = -x.advantages * x.log_ratio, -x.advantages * jnp.clip(x.log_ratio, low, high)
    losses = jnp.where(bounded > plain, bounded, plain)
    stats = {"low": (x.log_ratio < low) & (x.advantages < 0), "high": (x.log_ratio > high) & (x.advantages > 0)}
    if objective.dual_clip is not None:
        bound = -x.advantages * math.log(objective.dual_clip)
        stats["dual"] = (x.advantages < 0) & (losses > bound)
        losses = jnp.where(stats["dual"], bound, losses)
    drift = _drift(x.log_ratio, objective.drift_clip)
    return losses + objective.drift_coef * drift, _shares(**stats) | {"drift_mean": drift}


def _drift(log_ratio: Tokens, limit: float) -> Tokens:
    """KL(old || new) by k3, r - 1 - d, whose slope r - 1 stays at ``limit`` from there on."""
    knee = math.log1p(limit)
    inside = jnp.minimum(log_ratio, knee)
    return jnp.expm1(inside) - inside + limit * (log_ratio - inside)


def sapo(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """A smooth gate in place of clipping: -A (4 / t) sigmoid(t (r - 1)), t by the sign of A (arXiv:2511.20347)."""
    sharpness = jnp.where(x.advantages > 0, objective.sapo_positive, objective.sapo_negative)
    gate = jax.nn.sigmoid(sharpness * (x.ratio - 1.0))
    # 1 at a ratio of 1, and 0 where the gradient has died off.
    slope = 4.0 * gate * (1.0 - gate)
    return -x.advantages * 4.0 / sharpness * gate, {"sapo/slope_mean": slope}


def clipped_sides(objective: PolicyObjective, ratio: Tokens, advantages: Tokens) -> tuple[Array, Array]:
    """Where the clipped surrogate has no gradient: ratios too low with A < 0, and too high with A > 0."""
    low = (ratio < 1.0 - objective.clip_low) & (advantages < 0)
    return low, (ratio > 1.0 + objective.upper) & (advantages > 0)


def _shares(**places: Array) -> TokenStats:
    """Statistics of the places where a bound holds; ``low`` and ``high`` together are the region."""
    places["region"] = places["low"] | places["high"]
    return {f"clip_ratio/{name}_mean": value.astype(jnp.float32) for name, value in places.items()}
