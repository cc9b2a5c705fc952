"""The sampling side of a run: completions of prompts, and their rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jaxrft.data.records import Prompt
from jaxrft.rewards.calls import RewardPart, Samples
from jaxrft.rewards.combine import RewardSet
from jaxrft.rewards.records import Scores
from jaxrft.rollout.engine import Engine
from jaxrft.rollout.records import Completion, Request, SamplingParams
from jaxrft.training.call_thread import CallThread
from jaxrft.training.overlap import Overlap
from jaxrft.training.phases import Phases
from jaxrft.training.rollouts import RolloutBatch, completion_texts, make_requests


class Collector:
    """Asks an engine for completions and rewards for scores.

    Args:
        engine: generates.
        tokenizer: turns tokens into what the rewards see.
        rewards: score that.
        overlap: call them with groups that are finished, while others are generated.
    """

    def __init__(self, engine: Engine, tokenizer: Any, rewards: RewardSet, overlap: bool = False):
        self.engine, self.tokenizer, self.rewards, self.overlap = engine, tokenizer, rewards, overlap
        self._calls = CallThread("reward calls")

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
        if self.overlap:
            completions, texts, scores = self._overlapped(
                prompts, make_requests(prompts, group, first_seed), sampling, phases, phase
            )
        else:
            completions, texts = self.complete(prompts, group, sampling, first_seed, phases, phase or "rollout")
            with phases(phase or "rewards", len(texts)):
                answered = [p for p in prompts for _ in range(group)]
                scores = self.rewards.score(answered, texts, [c.token_ids for c in completions])
        return RolloutBatch(prompts=list(prompts), completions=completions, texts=texts, scores=scores, group=group)

    def _overlapped(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        sampling: SamplingParams,
        phases: Phases,
        phase: str | None,
    ) -> tuple[list[Completion], list[str], Scores]:
        """Completions, texts and scores of requests, one a prompt; each is scored as soon as it is finished."""
        group = requests[0].n

        def make_part(groups: list[int], completions: list[Completion]) -> RewardPart:
            texts = completion_texts(self.tokenizer, completions)
            places = [g * group + i for g in groups for i in range(group)]
            answered = [prompts[place // group] for place in places]
            return RewardPart(Samples.of(answered, texts, [c.token_ids for c in completions], places))

        with Overlap(self._calls, make_part, self.rewards) as overlap:
            with phases(phase or "rollout", len(requests) * group) as progress:

                def on_progress(done: int, total: int) -> None:
                    progress(done, total)
                    overlap.check()

                def on_finished(place: int, finished: list[Completion]) -> None:
                    phases.check()  # an engine tells of groups first: no reward is called where a signal has come
                    overlap.add(place, finished)

                completions = self.engine.generate(requests, sampling, on_progress, on_finished)
                generated = time.perf_counter()
            with phases(phase or "rewards", len(completions)) as progress:
                texts = overlap.wait(progress)
                scores = self.rewards.total(overlap.parts)
            phases.timer.add("rewards_overlapped", overlap.seconds_before(generated))
        return completions, texts, scores

    def close(self) -> None:
        """Ends the thread that calls rewards; with ``overlap`` nothing can be collected after."""
        self._calls.close()
