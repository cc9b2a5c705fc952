"""What goes into an engine and what comes out."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Truncation applies in the order top-k, top-p, min-p, to the distribution after temperature.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_p: smallest set of most probable tokens whose probability reaches this.
        top_k: the k most probable tokens; 0: all.
        min_p: tokens of at least this share of the most probable token's probability.
        max_tokens: tokens of a completion at most.
        min_tokens: no stop token is drawn and no stop text counts before this many tokens.
        stop: texts that end a completion; they stay in it. Needs an engine with a tokenizer.
        stop_token_ids: tokens that end a completion, beside the engine's end-of-sequence
            tokens; the token stays in the completion.
        ignore_eos: do not stop at the engine's own end-of-sequence tokens.
        seed: completions depend on it, on the request's seed and place in its group alone, not on what
            else is generated beside them.
        first_token_temperature: temperature of the first token (FIRE sampling, arXiv:2410.21236).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    first_token_temperature: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete.

    Attributes:
        prompt_ids: its tokens, at least one.
        n: completions wanted.
        seed: added to the sampling's seed; None: the request's place in the list of requests.
    """

    prompt_ids: list[int]
    n: int = 1
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: sampled tokens; the stop token is the last where there was one.
        logprobs: float32 [tokens]; log-softmax of logits over the temperature that the token was
            drawn at (1 where that is 0), without truncation: what the trainer computes.
            None where the engine cannot know it.
        sampled_logprobs: float32 [tokens]; of the distribution that was drawn from, after
            truncation; 0 where greedy.
        finish_reason: ``stop`` (stop token or text), ``length`` (max_tokens), ``abort``.
        versions: version of the weights for each span, as (first token, version).
    """

    token_ids: list[int]
    logprobs: np.ndarray | None
    sampled_logprobs: np.ndarray | None
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...] = ((0, 0),)
