"""What the rewards room hands on."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32

from jaxrft.config import ConfigError


class RewardError(ConfigError):
    """A reward that raised, or returned something else than one number or None per sample.

    The message names the reward and, where it can be known, the sample. What the reward raised is
    ``__cause__``.
    """


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
