"""One rollout on the host: prompts, completions, rewards, advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrft import algorithms as alg
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
        advantages: float32 [samples].
        group: completions of a prompt.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    texts: list[str]
    scores: Scores
    advantages: np.ndarray
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


def make_requests(prompts: Sequence[Prompt], n: int, first_seed: int) -> list[Request]:
    """One request a prompt, each with a seed of its own."""
    return [Request(prompt_ids=p.token_ids, n=n, seed=first_seed + i) for i, p in enumerate(prompts)]


def completion_texts(tokenizer: Any, completions: Sequence[Completion]) -> list[str]:
    """What the model wrote, without special tokens."""
    return tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def group_advantages(rewards: np.ndarray, group: int, estimator: alg.AdvantageEstimator) -> np.ndarray:
    """Advantages of samples that lie group after group, float32 [samples]."""
    groups = len(rewards) // group
    ids = np.repeat(np.arange(groups), group)
    return np.asarray(
        alg.group_advantages(rewards, ids, groups, baseline=estimator.baseline, scale=estimator.scale), np.float32
    )


def make_samples(rollout: RolloutBatch, mask_truncated: bool) -> list[Sample]:
    """What is trained on: all of a rollout's samples, those left out of the loss marked as such."""
    if any(c.logprobs is None for c in rollout.completions):
        raise ValueError("completions: the engine gave no log-probabilities without truncation to train against")
    scored = ~np.isnan(rollout.scores.total)
    trained = scored & ~(rollout.truncated & mask_truncated)
    return [
        Sample(
            prompt_ids=rollout.prompt_of(i).token_ids,
            response_ids=completion.token_ids,
            logprobs=np.asarray(completion.logprobs),
            advantage=float(rollout.advantages[i]),
            trained=bool(trained[i]),
        )
        for i, completion in enumerate(rollout.completions)
    ]


def shuffled(samples: Sequence[Sample], seed: int, rollout: int) -> list[Sample]:
    """The samples in a random order, so that each of several optimizer steps sees a mixture of the groups."""
    keys = np.random.Philox(np.random.SeedSequence((seed, rollout))).random_raw(len(samples))
    return [samples[i] for i in np.argsort(keys, kind="stable")]
