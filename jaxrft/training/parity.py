"""Parity of engine and trainer: fixed prompts through both, before anything is trained on what the engine says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxrft.config import ConfigError
from jaxrft.rollout.records import SamplingParams
from jaxrft.training.audit import Audit, AuditError
from jaxrft.training.batch import Sample
from jaxrft.training.rollouts import make_requests

if TYPE_CHECKING:
    from jaxrft.training.trainer import RLTrainer

PROMPTS, TOKENS = 8, 16


class ParityError(AuditError):
    """Engine and trainer give the same tokens other probabilities."""


def compare(trainer: RLTrainer) -> float:
    """The gap of log-probabilities on the first prompts of the run's data.

    Completions are drawn at the run's temperature without truncation, whatever the run draws from, so that every engine
    knows their log-probabilities.

    Returns:
        The largest gap in float32, the mean one in bfloat16 and float16, and where the engine's weights are quantised.

    Raises:
        ParityError: it is above the tolerance.
    """
    config = trainer.config
    prompts = trainer.train_prompts or trainer.eval_prompts
    if prompts is None:
        raise ConfigError("data.train: got None; a comparison of engine and trainer needs prompts")
    requests = make_requests(prompts.prompts[:PROMPTS], 1, 0)
    sampling = SamplingParams(
        temperature=config.temperature,
        first_token_temperature=config.rollout.first_token_temperature,
        max_tokens=min(TOKENS, config.max_completion_length),
        seed=config.seed,
    )
    completions = trainer.engine.generate(requests, sampling)
    samples, theirs = [], []
    for request, completion in zip(requests, completions):
        if completion.logprobs is None:
            raise ConfigError(
                "rollout.parity: the engine does not know the log-probabilities at this run's temperatures; see "
                "docs/vllm.md, or set rollout.parity=never"
            )
        samples.append(
            Sample(prompt_ids=request.prompt_ids, response_ids=completion.token_ids, logprobs=completion.logprobs)
        )
        theirs.append(completion.logprobs)
    gaps = np.concatenate([np.abs(a - b) for a, b in zip(trainer.learner.score(samples), theirs)])
    audit = Audit(config.audit, np.dtype(trainer.model.dtype).name, config.rollout.quantization)
    gap = audit.gap(gaps)
    if not gap <= audit.logprob_tolerance:
        raise ParityError(
            f"parity: log-probabilities of engine and trainer differ on fixed prompts: {audit.word} {gap:.3g}, "
            f"tolerance {audit.logprob_tolerance:.3g}. Likely causes: tied embeddings that were not renewed, another "
            "rope scaling, a server in another dtype, another tokenizer or chat template, weights of another version. "
            "(rollout.parity=never trains regardless, audit.logprob_tolerance moves the bound.)"
        )
    return gap
