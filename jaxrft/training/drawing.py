"""Which prompts a rollout is made of: those that come next, or those that a recipe's filter keeps of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxrft import algorithms as alg
from jaxrft.training.rollouts import RolloutBatch, join


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """All that was generated for one rollout, and what of it is trained on.

    Attributes:
        rollout: every group that was generated.
        groups: those that make up the training batch, in order.
        dropped: bool [groups of the rollout]: those that the filter takes out. Some may be among ``groups``, to fill
            them up; they are left out of the loss.
        prompts: prompts drawn from the stream.
    """

    rollout: RolloutBatch
    groups: list[int]
    dropped: np.ndarray
    prompts: int

    @property
    def samples(self) -> list[int]:
        """The samples of ``groups``."""
        return self.rollout.samples_of(self.groups)

    def metrics(self, filter: alg.GroupFilter) -> dict[str, float]:
        """What the filter did; nothing where it is off."""
        if not filters(filter):
            return {}
        return {
            "filter/drawn_ratio": self.prompts / len(self.groups),
            "filter/kept_ratio": 1.0 - float(self.dropped.mean()),
            "filter/missing_groups": float(self.dropped[self.groups].sum()),
        }


def filters(filter: alg.GroupFilter) -> bool:
    """Whether a filter can take anything out."""
    return filter.dynamic_sampling or filter.difficulty_low is not None or filter.difficulty_high is not None


def dropped_groups(rollout: RolloutBatch, filter: alg.GroupFilter) -> np.ndarray:
    """Bool [groups]: those that a filter takes out, by their rewards as they were scored."""
    return np.array([_drops(group, filter) for group in rollout.scores.total.reshape(-1, rollout.group)], bool)


def _drops(rewards: np.ndarray, filter: alg.GroupFilter) -> bool:
    if not filters(filter):
        return False
    valid = rewards[~np.isnan(rewards)]
    if valid.size == 0 or (filter.dynamic_sampling and np.ptp(valid) == 0):
        return True
    # Bounds are rounded as the mean is: 3 of 10 are not above 0.3.
    mean = np.float32(valid.mean(dtype=np.float64))
    too_low = filter.difficulty_low is not None and mean < np.float32(filter.difficulty_low)
    return bool(too_low or (filter.difficulty_high is not None and mean > np.float32(filter.difficulty_high)))


def draw(collect: Callable[[int, int], RolloutBatch], start: int, count: int, filter: alg.GroupFilter) -> Drawn:
    """One rollout of ``count`` groups.

    Without dynamic sampling these are the next ``count`` prompts. With it, prompts are drawn, as many at a time as the
    share kept so far promises to be enough, until as many groups are kept or the filter's limit is reached.

    Args:
        collect: generates and scores the groups of ``(start, count)`` of the stream of prompts.
        start: prompts drawn from the stream before.
        count: groups to train on.
        filter: which groups are kept.
    """
    limit = filter.max_draws * count if filter.dynamic_sampling else count
    parts, drawn, kept, wanted = [], 0, 0, count
    while wanted > 0:
        parts.append(collect(start + drawn, wanted))
        drawn += wanted
        kept += int((~dropped_groups(parts[-1], filter)).sum())
        share = max(kept, 1) / drawn
        wanted = min(math.ceil(max(count - kept, 0) / share), count, limit - drawn)
    rollout = join(parts)
    dropped = dropped_groups(rollout, filter)
    # Where too few are kept, dropped ones stand in for them: the batch has the same shape in every step.
    groups = sorted(range(drawn), key=lambda group: bool(dropped[group]))[:count]
    return Drawn(rollout=rollout, groups=sorted(groups), dropped=dropped, prompts=drawn)
