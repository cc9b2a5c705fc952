"""A recipe: all parts of an algorithm, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrft.algorithms.choices import require_choice, require_range
from jaxrft.algorithms.estimators import AdvantageEstimator
from jaxrft.algorithms.objectives import SPECIFIC, SURROGATES, PolicyObjective, unread
from jaxrft.algorithms.shaping import RewardShaping


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLControl:
    """Where the KL to the reference goes, and how its weight changes; weight and estimator are the objective's.

    Attributes:
        kl_in_reward: subtract it from the tokens' rewards, in place of adding it to the loss.
        kl_target: after each rollout the weight is changed so that the KL comes closer to this, see
            :func:`~jaxrft.algorithms.adaptive_kl_coef`; None: the weight stays as it is.
        kl_horizon: samples in which the weight changes by a fifth at most.

    Raises:
        ValueError: a number out of range.
    """

    kl_in_reward: bool = False
    kl_target: float | None = None
    kl_horizon: int = 10_000

    def __post_init__(self) -> None:
        require_range("kl_horizon", self.kl_horizon, 1)
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target: got {self.kl_target!r}, takes a number above 0")
        if self.kl_target is None and self.kl_horizon != 10_000:
            raise ValueError("kl_horizon: set without kl_target, to which it belongs; remove it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupFilter:
    """Which groups are trained on.

    Attributes:
        dynamic_sampling: groups of equal rewards are dropped, and prompts drawn until the rollout is whole (DAPO,
            arXiv:2503.14476).
        max_draws: at most this many times the prompts of a rollout are drawn for one; what is missing then is
            filled up with groups that were dropped, which teach nothing.
        difficulty_low, difficulty_high: groups whose mean reward is outside are dropped: without dynamic sampling
            they are left out of the loss, with it they are replaced. None: no bound.

    Raises:
        ValueError: a number out of range.
    """

    dynamic_sampling: bool = False
    max_draws: int = 10
    difficulty_low: float | None = None
    difficulty_high: float | None = None

    def __post_init__(self) -> None:
        require_range("max_draws", self.max_draws, 1)
        low, high = self.difficulty_low, self.difficulty_high
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"difficulty_low: got {low!r}, takes at most difficulty_high ({high!r})")
        if not self.dynamic_sampling and self.max_draws != 10:
            raise ValueError("max_draws: set without dynamic_sampling, of which it is the limit; remove it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm, part by part in the order in which they act.

    Attributes:
        filter: which groups are trained on.
        shaping: what is done to rewards.
        advantage: how they become advantages.
        policy: the loss.
        kl: where the KL to the reference goes.

    Raises:
        ValueError: parts that do not go together.
    """

    filter: GroupFilter = GroupFilter()
    shaping: RewardShaping = RewardShaping()
    advantage: AdvantageEstimator = AdvantageEstimator()
    policy: PolicyObjective = PolicyObjective()
    kl: KLControl = KLControl()

    def __post_init__(self) -> None:
        if self.advantage.aggregation == "normalize_then_sum":
            for field, default in (("running_norm", "none"), ("reward_clip", None)):
                if getattr(self.shaping, field) != default:
                    raise ValueError(f"{field}: acts on the sum of the rewards; remove it or aggregation")
        if self.kl.kl_in_reward and self.policy.kl_weighted:
            raise ValueError("kl_weighted: is of the KL in the loss; remove it or kl_in_reward")
        if self.kl.kl_target is not None and not self.policy.kl_coef > 0:
            raise ValueError("kl_target: changes kl_coef, which is 0; set its first value, such as 0.01")

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with some fields, named as in its parts, changed.

        With another ``objective``, the fields that it does not read go back to their defaults; so does a ``level``
        that it does not have, and the bounds with it, which are those of a level.

        Raises:
            ValueError: no part has a field of that name (the message gives the nearest), the value is refused, or the
                field would change nothing, as a clip range of an objective that does not clip.
        """
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        owner = {field.name: name for name, part in parts.items() for field in dataclasses.fields(part)}
        changes: dict[str, dict[str, Any]] = {name: {} for name in parts}
        if "objective" in overrides:
            changes["policy"] = _reset(self.policy, str(overrides["objective"]))
        for field, value in overrides.items():
            require_choice("recipe field", field, owner)
            changes[owner[field]][field] = value
        changed = Recipe(**{name: dataclasses.replace(part, **changes[name]) for name, part in parts.items()})
        for field in overrides:
            reason = unread(changed.policy, field)
            if reason and getattr(changed.policy, field) != _DEFAULTS[field]:
                raise ValueError(f"{field}: {reason}")
        return changed


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PolicyObjective)}


def _reset(policy: PolicyObjective, objective: str) -> dict[str, Any]:
    """The fields that another objective does not read as this one did, at their defaults."""
    require_choice("objective", objective, SURROGATES)
    surrogate = SURROGATES[objective]
    reset = [field for field in SPECIFIC if field not in surrogate.fields]
    if policy.level not in surrogate.levels:
        reset += ["level", "clip_low", "clip_high"]
    return {field: _DEFAULTS[field] for field in reset}
