"""Named algorithms: values of one type, any field of which can be changed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from jaxrft.algorithms.advantages import Baseline, Scale
from jaxrft.algorithms.objectives import PolicyObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageEstimator:
    """How rewards become advantages, see :func:`~jaxrft.algorithms.advantages.group_advantages`."""

    baseline: Baseline = "mean"
    scale: Scale = "std"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm: an advantage estimator and a policy objective."""

    advantage: AdvantageEstimator = AdvantageEstimator()
    policy: PolicyObjective = PolicyObjective()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with some fields, named as in either of its parts, changed."""
        parts = {}
        for name in ("advantage", "policy"):
            part = getattr(self, name)
            fields = {f.name for f in dataclasses.fields(part)}
            parts[name] = dataclasses.replace(part, **{k: v for k, v in overrides.items() if k in fields})
        return Recipe(**parts)


_RECIPES = {
    # arXiv:2402.03300; no KL by default, as later work and TRL have it.
    "grpo": Recipe(policy=PolicyObjective(reduction="sequence_mean")),
    # arXiv:2503.20783: neither the standard deviation nor the response's length biases the gradient.
    "dr_grpo": Recipe(advantage=AdvantageEstimator(scale="none"), policy=PolicyObjective(reduction="constant")),
    # arXiv:2503.14476: clip-higher and the token-level loss.
    "dapo": Recipe(policy=PolicyObjective(clip_low=0.2, clip_high=0.28, reduction="token_mean")),
}


def recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(_RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe: got {name!r}, takes one of {', '.join(recipes())}{hint}")
    return _RECIPES[name]
