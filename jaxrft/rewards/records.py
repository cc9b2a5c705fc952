"""What the rewards room hands on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Float32

from jaxrft.config import ConfigError


class RewardError(ConfigError):
    """A reward that raised, or returned something else than one number or None per sample.

    The message names the reward and, where it can be known, the sample. What the reward raised is
    ``__cause__``.
    """


@dataclasses.dataclass(frozen=True)
class PartScores:
    """The rewards of some samples of a rollout.

    Attributes:
        places: of these samples in the rollout.
        components: each reward by name, before its weight; NaN where it does not apply (None).
        errors: samples whose reward raised and was counted as None, summed over rewards.
    """

    places: list[int]
    components: dict[str, Float32[np.ndarray, " samples"]]
    errors: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of a rollout.

    Attributes:
        total: weighted sum of the rewards that apply to a sample; NaN where none does.
        components: each reward by name, before its weight; NaN where it does not apply (None).
        errors: samples whose reward raised and was counted as None, summed over rewards.
        metrics: further numbers of the rewards, such as ``rewards/math/timeouts``.
    """

    total: Float32[np.ndarray, " samples"]
    components: dict[str, Float32[np.ndarray, " samples"]]
    errors: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def select(self, samples: Sequence[int]) -> Self:
        """Those of some samples; counts and further numbers are of the whole rollout and stay behind."""
        chosen = np.asarray(samples, int)
        return type(self)(
            total=self.total[chosen], components={name: values[chosen] for name, values in self.components.items()}
        )

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Self:
        """Those of several rollouts; counts and further numbers are added."""
        names = parts[0].components
        numbers = {name for part in parts for name in part.metrics}
        return cls(
            total=np.concatenate([part.total for part in parts]),
            components={name: np.concatenate([part.components[name] for part in parts]) for name in names},
            errors=sum(part.errors for part in parts),
            metrics={name: sum(part.metrics.get(name, 0.0) for part in parts) for name in sorted(numbers)},
        )
