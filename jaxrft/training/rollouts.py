"""One rollout on the host: prompts, completions, rewards, advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrft.config import RLConfig
from jaxrft.data.records import Prompt
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion, Request, SamplingParams
from jaxrft.training.batch import Sample

_EVALUATION_SEED_OFFSET = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Completions of a number of prompts, ragged; sample i belongs to prompt i // ``group``.

    Attributes:
        prompts: one a group.
        completions: ``group`` of each prompt, in order.
        texts: what the rewards saw, without special tokens.
        scores: total reward and components of each sample.
        group: completions of a prompt.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    texts: list[str]
    scores: Scores
    group: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion."""
        return np.array([len(c.token_ids) for c in self.completions])

    @property
    def truncated(self) -> np.ndarray:
        """Which completions were cut off at their longest."""
        return np.array([c.finish_reason == "length" for c in self.completions])

    def prompt_of(self, sample: int) -> Prompt:
        """The prompt that a sample answers."""
        return self.prompts[sample // self.group]

    def samples_of(self, groups: Sequence[int]) -> list[int]:
        """The samples of some groups, group after group."""
        return [group * self.group + i for group in groups for i in range(self.group)]

    def select(self, groups: Sequence[int]) -> RolloutBatch:
        """Some of the groups, in the order given."""
        chosen = self.samples_of(groups)
        return RolloutBatch(
            prompts=[self.prompts[g] for g in groups],
            completions=[self.completions[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            scores=self.scores.select(chosen),
            group=self.group,
        )


def join(rollouts: Sequence[RolloutBatch]) -> RolloutBatch:
    """Several rollouts of the same group size as one."""
    if len(rollouts) == 1:
        return rollouts[0]
    return RolloutBatch(
        prompts=[p for r in rollouts for p in r.prompts],
        completions=[c for r in rollouts for c in r.completions],
        texts=[t for r in rollouts for t in r.texts],
        scores=Scores.join([r.scores for r in rollouts]),
        group=rollouts[0].group,
    )


def training_sampling(config: RLConfig) -> SamplingParams:
    """How completions to train on are drawn."""
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_completion_length,
        min_tokens=config.rollout.min_tokens,
        stop=tuple(config.rollout.stop),
        stop_token_ids=tuple(config.rollout.stop_token_ids),
        seed=config.seed,
        first_token_temperature=config.rollout.first_token_temperature,
    )


def evaluation_sampling(config: RLConfig) -> SamplingParams:
    """How held-out prompts are answered: as in training but for what ``evaluation`` declares."""
    return dataclasses.replace(
        training_sampling(config),
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        top_k=0,
        min_p=0.0,
        first_token_temperature=None,
        # Not the stream that training's first rollout is drawn from.
        seed=config.seed + _EVALUATION_SEED_OFFSET,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """The same, but for the most probable token at each place."""
    return dataclasses.replace(sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, first_token_temperature=None)


def make_requests(prompts: Sequence[Prompt], n: int, first_seed: int) -> list[Request]:
    """One request a prompt, each with a seed of its own."""
    return [Request(prompt_ids=p.token_ids, n=n, seed=first_seed + i) for i, p in enumerate(prompts)]


def completion_texts(tokenizer: Any, completions: Sequence[Completion]) -> list[str]:
    """What the model wrote, without special tokens."""
    return tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def make_samples(rollout: RolloutBatch, mask_truncated: bool, dropped: np.ndarray) -> list[Sample]:
    """What is trained on: all of a rollout's samples, those left out of the loss marked as such.

    Args:
        rollout: with one group for each prompt.
        mask_truncated: leave out completions that were cut off at their longest.
        dropped: bool [groups]: those to leave out.
    """
    scored = ~np.isnan(rollout.scores.total)
    trained = scored & ~(rollout.truncated & mask_truncated) & ~np.repeat(dropped, rollout.group)
    return [
        Sample(
            prompt_ids=rollout.prompt_of(i).token_ids,
            response_ids=completion.token_ids,
            logprobs=_logprobs(completion),
            trained=bool(trained[i]),
            group=i // rollout.group,
        )
        for i, completion in enumerate(rollout.completions)
    ]


def lack_logprobs(completions: Sequence[Completion]) -> bool:
    """Whether an engine could not know the log-probabilities of some."""
    return any(completion.logprobs is None for completion in completions)


def _logprobs(completion: Completion) -> np.ndarray:
    """The engine's; zeros where it does not know them, until the trainer's stand in."""
    if completion.logprobs is None:
        return np.zeros(len(completion.token_ids), np.float32)
    return np.asarray(completion.logprobs)


def shuffled(count: int, seed: int, rollout: int, block: int = 1) -> list[int]:
    """A random order of ``count`` samples, so that each of several optimizer steps sees a mixture of the groups.

    Args:
        block: so many samples that follow one another stay together; 1 mixes all.
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, rollout))).random_raw(count // block)
    return [int(b) * block + i for b in np.argsort(keys, kind="stable") for i in range(block)]
