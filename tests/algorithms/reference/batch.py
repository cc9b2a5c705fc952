"""The inputs of a loss in float64, and the fields of an objective."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

import numpy as np

MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What an objective is made of, with the documented defaults."""

    objective: str = "clip"
    level: str = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    drift_coef: float = 0.01
    drift_clip: float = 2.0
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    cov_share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_coef: float = 1.0
    dro_coef: float = 0.1
    gvpo_coef: float = 0.1
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    entropy_share: float | None = None
    entropy_scope: str = "batch"
    correction: str = "none"
    correction_level: str = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0
    sequence_mask: float | None = None
    reduction: str = "token_mean"
    constant_length: int | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    kl_weighted: bool = False

    def __post_init__(self) -> None:
        if self.objective in ("luspo", "vespo", "gvpo"):
            object.__setattr__(self, "level", "sequence")

    @property
    def low(self) -> float:
        """Least ratio that is not clipped."""
        return 1 - self.clip_low

    @property
    def above(self) -> float:
        """``clip_high``, or what stands for it."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def high(self) -> float:
        """Largest ratio that is not clipped."""
        return 1 + self.above


def clamp(value: float) -> float:
    return min(max(value, -MAX_LOG_RATIO), MAX_LOG_RATIO)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


class Batch:
    """Inputs, of which ``logprobs`` may be moved while ``frozen`` stays: detached terms are made of the latter.

    ``margins`` collects how far numbers were from what they were compared with, in units of their rounding: where
    one is tiny, float32 may decide otherwise, and a difference quotient may straddle a kink.
    """

    def __init__(
        self, logprobs, old, advantages, mask, sampler=None, entropies=None, ref=None, groups=None, scores=None
    ) -> None:
        arrays = [None if a is None else np.asarray(a, np.float64) for a in (logprobs, old, sampler, entropies, ref)]
        self.logprobs, self.old, self.sampler, self.entropies, self.ref = arrays
        self.frozen = self.logprobs
        self.mask = np.asarray(mask)
        advantages = np.asarray(advantages, np.float64)
        self.advantages = advantages if advantages.ndim == 2 else np.repeat(advantages[:, None], mask.shape[1], 1)
        self.rows = [[t for t in range(mask.shape[1]) if mask[i, t]] for i in range(mask.shape[0])]
        self.places = [(i, t) for i, row in enumerate(self.rows) for t in row]
        self.groups = np.zeros(len(self.rows), int) if groups is None else np.asarray(groups)
        self.scores = scores
        self.margins: list[float] = []

    def moved(self, place: tuple[int, int], step: float) -> Batch:
        """The same with another log-probability at one place."""
        other = copy.copy(self)
        other.logprobs = self.logprobs.copy()
        other.logprobs[place] += step
        return other

    def now(self, i: int, t: int) -> float:
        """The log-ratio that gradients flow through."""
        difference = self.logprobs[i, t] - self.old[i, t]
        self.compare(abs(difference), MAX_LOG_RATIO)
        return clamp(difference)

    def then(self, i: int, t: int) -> float:
        """The log-ratio, detached."""
        return clamp(self.frozen[i, t] - self.old[i, t])

    def compare(self, value: float, threshold: float, scale: float = 1.0) -> None:
        """Notes that the one is compared with the other."""
        self.margins.append(abs(value - threshold) / scale)
