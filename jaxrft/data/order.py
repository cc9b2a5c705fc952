"""The order in which prompts are trained on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import numpy as np

from jaxrft.config import ConfigError


@dataclasses.dataclass(frozen=True)
class PromptOrder:
    """Which prompts each rollout takes: a pure function of the rollout's number.

    Nothing is remembered between calls, so a run that resumes at rollout ``n`` continues exactly.
    The epochs, each a permutation of all prompts, follow one another in one stream that is cut into
    batches: a batch may end one epoch and begin the next, and every epoch holds each prompt once.

    Attributes:
        count: prompts in the dataset.
        batch: prompts of one rollout, over all processes; may exceed ``count``.
        seed: seed of the permutations, at least 0.
        shuffle: a new permutation in each epoch; else the dataset's own order.
        process, processes: this process takes the ``process``-th of ``processes`` equal,
            contiguous shares of each batch.

    Raises:
        ConfigError: no prompts, no batch, or shares that are not equal.
    """

    count: int
    batch: int
    _: dataclasses.KW_ONLY
    seed: int
    shuffle: bool = True
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1:
            raise ConfigError(f"prompts: got {self.count} prompts in batches of {self.batch}, takes at least 1 of each")
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"process: got {self.process} of {self.processes}, takes 0 to {self.processes - 1}")
        if self.batch % self.processes:
            raise ConfigError(
                f"prompts of a rollout: got {self.batch}, takes a multiple of the {self.processes} processes"
            )

    def indices(self, rollout: int) -> list[int]:
        """Positions in the dataset of the prompts that this process takes in a rollout (from 0)."""
        share = self.batch // self.processes
        return self.take(rollout * self.batch + self.process * share, share)

    def take(self, start: int, count: int) -> list[int]:
        """Positions in the dataset of ``count`` prompts of the stream, from its ``start``-th on."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.count)
            rest = count - len(found)
            found.extend(_permutation(self.count, self.seed if self.shuffle else None, epoch)[offset : offset + rest])
        return found

    def epoch(self, rollout: int) -> float:
        """Epochs done before a rollout."""
        return rollout / self.rollouts_per_epoch

    @property
    def rollouts_per_epoch(self) -> float:
        """Rollouts in which each prompt is taken once; not a whole number where batches cross epochs."""
        return self.count / self.batch

    def for_process(self, index: int, count: int) -> Self:
        """The share of process ``index`` of ``count``; together the shares are the whole batch, in order."""
        return dataclasses.replace(self, process=index, processes=count)


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int | None, epoch: int) -> list[int]:
    if seed is None:
        return list(range(count))
    # NumPy keeps a bit generator's raw stream the same over its versions; it does not promise that
    # of Generator.permutation.
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(keys, kind="stable").tolist()
