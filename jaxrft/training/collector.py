"""The sampling side of a run: completions of prompts, and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxrft.data.records import Prompt
from jaxrft.rewards.combine import RewardSet
from jaxrft.rollout.engine import Engine
from jaxrft.rollout.records import Completion, SamplingParams
from jaxrft.training.phases import Phases
from jaxrft.training.rollouts import RolloutBatch, completion_texts, make_requests


class Collector:
    """Asks an engine for completions and rewards for scores.

    Args:
        engine: generates.
        tokenizer: turns tokens into what the rewards see.
        rewards: score that.
    """

    def __init__(self, engine: Engine, tokenizer: Any, rewards: RewardSet):
        self.engine, self.tokenizer, self.rewards = engine, tokenizer, rewards

    def complete(
        self,
        prompts: Sequence[Prompt],
        group: int,
        sampling: SamplingParams,
        first_seed: int,
        phases: Phases,
        phase: str,
    ) -> tuple[list[Completion], list[str]]:
        """Completions of prompts, and their texts; arguments as in :meth:`collect`."""
        requests = make_requests(prompts, group, first_seed)
        with phases(phase, len(requests) * group) as progress:
            completions = self.engine.generate(requests, sampling, on_progress=progress)
        return completions, completion_texts(self.tokenizer, completions)

    def collect(
        self,
        prompts: Sequence[Prompt],
        group: int,
        sampling: SamplingParams,
        first_seed: int,
        phases: Phases,
        phase: str | None = None,
    ) -> RolloutBatch:
        """Completes and scores prompts.

        Args:
            prompts: what to complete.
            group: completions of each.
            sampling: how.
            first_seed: prompt i is completed with seed ``first_seed + i``.
            phases: where progress goes.
            phase: one name for the whole, in place of ``rollout`` and ``rewards``.
        """
        completions, texts = self.complete(prompts, group, sampling, first_seed, phases, phase or "rollout")
        with phases(phase or "rewards", len(texts)):
            answered = [p for p in prompts for _ in range(group)]
            scores = self.rewards.score(answered, texts, [c.token_ids for c in completions])
        return RolloutBatch(prompts=list(prompts), completions=completions, texts=texts, scores=scores, group=group)
