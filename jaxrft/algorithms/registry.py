"""Named algorithms: values of one type, any field of which can be changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxrft.algorithms.advantages import Baseline, Scale
from jaxrft.algorithms.choices import require_choice
from jaxrft.algorithms.objectives import PolicyObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageEstimator:
    """How rewards become advantages, see :func:`~jaxrft.algorithms.advantages.group_advantages`.

    Raises:
        ValueError: a name that is not known.
    """

    baseline: Baseline = "mean"
    scale: Scale = "std"

    def __post_init__(self) -> None:
        require_choice("baseline", self.baseline, get_args(Baseline))
        require_choice("scale", self.scale, get_args(Scale))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm: an advantage estimator and a policy objective."""

    advantage: AdvantageEstimator = AdvantageEstimator()
    policy: PolicyObjective = PolicyObjective()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with some fields, named as in its parts, changed.

        Raises:
            ValueError: no part has a field of that name (the message gives the nearest), or the value is refused.
        """
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        owner = {field.name: name for name, part in parts.items() for field in dataclasses.fields(part)}
        changes: dict[str, dict[str, Any]] = {name: {} for name in parts}
        for field, value in overrides.items():
            require_choice("recipe field", field, owner)
            changes[owner[field]][field] = value
        return Recipe(**{name: dataclasses.replace(part, **changes[name]) for name, part in parts.items()})


RECIPES: dict[str, Recipe] = {
    # arXiv:2402.03300; no KL by default, as later work and TRL have it.
    "grpo": Recipe(policy=PolicyObjective(reduction="sequence_mean")),
    # arXiv:2503.20783: neither the standard deviation nor the response's length biases the gradient.
    "dr_grpo": Recipe(advantage=AdvantageEstimator(scale="none"), policy=PolicyObjective(reduction="constant")),
    # arXiv:2503.14476: clip-higher and the token-level loss.
    "dapo": Recipe(policy=PolicyObjective(clip_low=0.2, clip_high=0.28, reduction="token_mean")),
}


def recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    require_choice("recipe", name, recipes())
    return RECIPES[name]
