"""From rewards to the advantages of tokens, as one description says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrft.algorithms.advantages import (
    Baseline,
    Scale,
    group_advantages,
    informative_weight,
    multi_reward_advantages,
)
from jaxrft.algorithms.choices import require_choice, require_range
from jaxrft.algorithms.returns import gae, length_adaptive_lambda, token_returns, whiten

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
GroupWeight = Literal["none", "informative"]
Estimator = Literal["group", "gae"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageEstimator:
    """How rewards become advantages, in the order of these fields.

    Attributes:
        estimator: ``group``: the response's reward, less a baseline; ``gae``: a critic's values are the baseline.
        baseline, scale: see :func:`~jaxrft.algorithms.group_advantages`.
        aggregation: of several rewards: ``sum_then_normalize``, or ``normalize_then_sum`` each for itself (GDPO).
        group_weight: ``informative`` makes up for groups of equal rewards, see
            :func:`~jaxrft.algorithms.informative_weight`; ``none``.
        group_weight_cap: bound of that weight.
        gamma: discount of one token.
        lam: of ``gae``.
        length_alpha: of ``gae``, in place of ``lam``: see :func:`~jaxrft.algorithms.length_adaptive_lambda`.
        whiten: bring the advantages of all tokens of the batch to mean 0 and variance 1.
        advantage_clip: advantages are clipped to +- this.

    Raises:
        ValueError: a name that is not known, a number out of range, or a field set that would change nothing.
    """

    estimator: Estimator = "group"
    baseline: Baseline = "mean"
    scale: Scale = "std"
    aggregation: Aggregation = "sum_then_normalize"
    group_weight: GroupWeight = "none"
    group_weight_cap: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    length_alpha: float | None = None
    whiten: bool = False
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        names = {
            "estimator": Estimator,
            "baseline": Baseline,
            "scale": Scale,
            "aggregation": Aggregation,
            "group_weight": GroupWeight,
        }
        for field, choices in names.items():
            require_choice(field, getattr(self, field), get_args(choices))
        for field, limits in {"gamma": (0, 1), "lam": (0, 1), "group_weight_cap": (1,), "advantage_clip": (0,)}.items():
            require_range(field, getattr(self, field), *limits)
        if self.length_alpha is not None and not self.length_alpha > 0:
            raise ValueError(f"length_alpha: got {self.length_alpha!r}, takes a number above 0")
        if self.group_weight == "none" and self.group_weight_cap is not None:
            raise ValueError("group_weight_cap: set without group_weight: informative, which it bounds; remove it")
        self._check_critic()

    def _check_critic(self) -> None:
        if self.estimator != "gae":
            for field, default in (("lam", 0.95), ("length_alpha", None)):
                if getattr(self, field) != default:
                    raise ValueError(f"{field}: set without estimator: gae, which alone reads it; remove it")
            return
        unread = {"baseline": "mean", "scale": "std", "aggregation": "sum_then_normalize", "group_weight": "none"}
        for field, plain in unread.items():
            if getattr(self, field) != plain:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, which gae does not read; remove it")


class Outcome(NamedTuple):
    """The rewards of a batch of responses.

    Attributes:
        rewards: total of each sample; NaN where none applies.
        components: each reward of each sample, and ``weights`` of the rewards in the total.
        group_ids: group of each sample.
        greedy_rewards, greedy_components: of each group's greedy completion; None without.
    """

    rewards: Float[Array, "samples"]
    components: Float[Array, "samples rewards"]
    weights: Float[Array, "rewards"]
    group_ids: Int[Array, "samples"]
    greedy_rewards: Float[Array, "groups"] | None = None
    greedy_components: Float[Array, "groups rewards"] | None = None


@functools.partial(jax.jit, static_argnums=(0, 2))
def estimate_advantages(
    estimator: AdvantageEstimator,
    outcome: Outcome,
    num_groups: int,
    mask: Float[Array, "samples time"],
    token_penalties: Float[Array, "samples time"] | None = None,
    values: Float[Array, "samples time"] | None = None,
) -> Float[Array, "samples time"]:
    """Advantages of all tokens; 0 where masked.

    A response's outcome (its reward, less baseline and scaled) is the reward of its last token; penalties are
    subtracted from each token's; what is still to come is a token's advantage.

    Args:
        estimator: static.
        outcome: rewards and groups.
        num_groups: static.
        mask: 1 for the response tokens that are trained on; whitening counts these alone.
        token_penalties: KL to the reference, weighted; None without.
        values: a critic's, before each token, for the estimator ``gae``.

    Raises:
        ValueError: ``gae`` without values.
    """
    mask = mask.astype(jnp.float32)
    if estimator.estimator == "gae":
        if values is None:
            raise ValueError("values: needed with the estimator gae")
        rewards = _at_the_end(jnp.nan_to_num(outcome.rewards), mask, token_penalties)
        lam = (
            estimator.lam
            if estimator.length_alpha is None
            else length_adaptive_lambda(jnp.sum(mask, axis=-1), estimator.length_alpha)
        )
        advantages, _ = gae(rewards, values, mask, estimator.gamma, lam)
    else:
        rewards = _at_the_end(_outcome_advantages(estimator, outcome, num_groups, mask), mask, token_penalties)
        advantages = token_returns(rewards, mask, estimator.gamma)
    if estimator.whiten:
        advantages = whiten(advantages, mask)
    if estimator.advantage_clip is not None:
        advantages = jnp.clip(advantages, -estimator.advantage_clip, estimator.advantage_clip)
    return advantages


def _outcome_advantages(
    estimator: AdvantageEstimator, outcome: Outcome, num_groups: int, mask: Float[Array, "samples time"]
) -> Float[Array, "samples"]:
    baseline, scale, lengths = estimator.baseline, estimator.scale, jnp.sum(mask, axis=-1)
    ids = outcome.group_ids
    if estimator.aggregation == "normalize_then_sum":
        greedy = outcome.greedy_components
        advantages = multi_reward_advantages(
            outcome.components, outcome.weights, ids, num_groups, baseline, scale, lengths=lengths,
            greedy_components=greedy,
        )  # fmt: skip
    else:
        greedy = outcome.greedy_rewards
        advantages = group_advantages(
            outcome.rewards, ids, num_groups, baseline, scale, lengths=lengths, greedy_rewards=greedy
        )
    if estimator.group_weight == "informative":
        weight = informative_weight(outcome.rewards, outcome.group_ids, num_groups, estimator.group_weight_cap)
        advantages = advantages * weight
    return advantages


def _at_the_end(
    outcomes: Float[Array, "samples"],
    mask: Float[Array, "samples time"],
    penalties: Float[Array, "samples time"] | None,
) -> Float[Array, "samples time"]:
    """Token rewards: the outcome at the last valid token, less the penalties."""
    later = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]
    rewards = jnp.where((mask > 0) & (later == 1), outcomes[:, None], 0.0)
    return rewards if penalties is None else rewards - jnp.where(mask > 0, penalties, 0.0)
