"""What goes into an engine and what comes out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxrft.config.base import ConfigError

FinishReason = Literal["stop", "length", "abort"]

# Below this, logits over the temperature leave the range where float32 tells neighbours apart.
MIN_TEMPERATURE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Stop tokens that ``min_tokens`` forbids are taken out first; truncation then applies in the order
    top-k, top-p, min-p, each to the distribution after temperature that the one before it left,
    renormalised. Tokens as probable as the last one kept are kept too, so that the result does not depend
    on the order of the vocabulary. Greedy ties go to the lowest token id.

    Attributes:
        temperature: logits are divided by it; 0 is greedy, otherwise at least 0.001.
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
            else is generated beside them. Of any integer, the lowest 32 bits count.
        first_token_temperature: temperature of the first token (FIRE sampling, arXiv:2410.21236).

    Raises:
        ConfigError: a field is out of its range; the message names the field, what it got and what it takes.
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

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            _check(self, name, isinstance(getattr(self, name), list | tuple), "a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        above = f"a number of at least {MIN_TEMPERATURE}"
        _check(
            self, "temperature", _is_temperature(self.temperature) or self.temperature == 0, f"0 (greedy) or {above}"
        )
        first = self.first_token_temperature
        _check(self, "first_token_temperature", first is None or _is_temperature(first), f"{above}, or None")
        _check(self, "top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check(self, "min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check(self, "top_k", _is_integer(self.top_k) and self.top_k >= 0, "an integer of at least 0 (0: all)")
        _check(self, "max_tokens", _is_integer(self.max_tokens) and self.max_tokens >= 1, "at least 1")
        holds = _is_integer(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        _check(self, "min_tokens", holds, f"an integer from 0 to max_tokens ({self.max_tokens})")
        _check(self, "stop", all(isinstance(s, str) and s for s in self.stop), "texts of at least one character")
        holds = all(_is_integer(token) and token >= 0 for token in self.stop_token_ids)
        _check(self, "stop_token_ids", holds, "token ids of at least 0")
        _check(self, "seed", _is_integer(self.seed), "an integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete.

    Attributes:
        prompt_ids: its tokens, at least one.
        n: completions wanted.
        seed: its own seed, beside the sampling's; None: the request's place in the list of requests.

    Raises:
        ConfigError: the prompt is empty, or ``n`` is below 1.
    """

    prompt_ids: list[int]
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ConfigError("prompt_ids: got an empty prompt, takes at least one token")
        _check(self, "n", _is_integer(self.n) and self.n >= 1, "an integer of at least 1")
        _check(self, "seed", self.seed is None or _is_integer(self.seed), "an integer or None")


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
        finish_reason: ``stop`` (stop token or text), ``length`` (max_tokens, or the engine's max_length),
            ``abort``.
        versions: version of the weights for each span, as (first token, version).
    """

    token_ids: list[int]
    logprobs: np.ndarray | None
    sampled_logprobs: np.ndarray | None
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...] = ((0, 0),)


# Takes a request's place in the list of requests, and all of its completions in order.
OnFinished = Callable[[int, list[Completion]], None]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)


def _is_temperature(value: Any) -> bool:
    return _is_number(value) and MIN_TEMPERATURE <= value < math.inf


def _check(record: Any, name: str, holds: bool, takes: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: got {getattr(record, name)!r}, takes {takes}")
