"""Requests and completions as vLLM's route from token ids to token ids spells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.records import Completion, FinishReason, Request, SamplingParams
from jaxrft.rollout.sampling import stop_token_ids
from jaxrft.rollout.stopping import stop_text_end

# What a server reports of each token, for all requests alike: log-probabilities before temperature, or after
# temperature and truncation.
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


def mode_for(temperatures: Sequence[float]) -> LogprobsMode:
    """The mode that knows most: where nothing is divided by, the raw ones are right under truncation too."""
    return "raw_logprobs" if all(t in (0.0, 1.0) for t in temperatures) else "processed_logprobs"


def truncates(sampling: SamplingParams) -> bool:
    """Whether tokens may be left out of the distribution that is drawn from."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 or sampling.min_tokens > 0


def knows_logprobs(mode: LogprobsMode, sampling: SamplingParams) -> bool:
    """Whether completions will have ``logprobs``: log-softmax over the temperature, without truncation."""
    temperatures = {sampling.temperature, sampling.first_token_temperature or sampling.temperature}
    if mode == "raw_logprobs":
        return temperatures <= {0.0, 1.0}
    return not truncates(sampling)


@dataclasses.dataclass(frozen=True)
class Wire:
    """Translates for one kind of server.

    Args:
        mode: of the server's log-probabilities.
        eos_ids: end-of-sequence tokens.
        max_length: tokens of prompt and completion together at most.
        decode: text of tokens; None without a tokenizer.
        seeds: whether completions are drawn with seeds of their own.
        reads_text: whether the server has a tokenizer too, and can stop at texts by itself.
    """

    mode: LogprobsMode
    eos_ids: tuple[int, ...]
    max_length: int
    decode: Callable[[Sequence[int]], str] | None
    reads_text: bool = True
    seeds: bool = True

    def payload(self, prompt_ids: Sequence[int], n: int, seed: int, sampling: SamplingParams) -> dict[str, Any]:
        """The body of a request for ``n`` completions; completion i is drawn with ``seed + i``."""
        reads_text = bool(sampling.stop) and self.reads_text
        params: dict[str, Any] = {
            # vLLM refuses several greedy ones, which are all the same.
            "n": n if sampling.temperature > 0 else 1,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": int(sampling.top_k),
            "min_p": float(sampling.min_p),
            "max_tokens": min(sampling.max_tokens, self.max_length - len(prompt_ids)),
            "min_tokens": min(sampling.min_tokens, self.max_length - len(prompt_ids)),
            "stop_token_ids": list(stop_token_ids(sampling, self.eos_ids)),
            # They are among the stop tokens, where they count. (vLLM forbids them before min_tokens even where not.)
            "ignore_eos": True,
            "logprobs": 0,
            # vLLM's number for 'only the end'. Older servers would else leave out completions that ended early.
            "output_kind": 2,
            "detokenize": reads_text,
        }
        if sampling.temperature > 0 and self.seeds:
            params["seed"] = seed
        if reads_text:
            params |= {"stop": list(sampling.stop), "skip_special_tokens": False}
            params |= {"include_stop_str_in_output": True}
        return {"token_ids": [int(token) for token in prompt_ids], "sampling_params": params}

    def completions(self, answer: dict[str, Any], n: int, sampling: SamplingParams) -> list[Completion]:
        """The completions of an answer to a request for ``n``, in order.

        Raises:
            EngineError: it holds another number of them, or lacks what a completion needs.
        """
        greedy = sampling.temperature == 0
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(1 if greedy else n)):
            raise EngineError(f"the server gave {len(choices)} completions of {n}: update vLLM")
        return [
            self._completion(choice, answer["versions"], sampling)
            for choice in choices
            for _ in range(n if greedy else 1)
        ]

    def _completion(self, choice: dict[str, Any], versions: Sequence[str], sampling: SamplingParams) -> Completion:
        tokens = [int(token) for token in choice["token_ids"] or []]
        content = (choice.get("logprobs") or {}).get("content") or []
        if len(content) != len(tokens):
            raise EngineError(f"the server gave {len(content)} log-probabilities for {len(tokens)} tokens")
        given = np.array([entry["logprob"] for entry in content], np.float32)
        plain = sampling.temperature in (0.0, 1.0) and not truncates(sampling)
        sampled = given if self.mode == "processed_logprobs" or plain else None
        whole = Completion(
            token_ids=tokens,
            logprobs=given if knows_logprobs(self.mode, sampling) else None,
            sampled_logprobs=np.zeros(len(tokens), np.float32) if sampling.temperature == 0 else sampled,
            finish_reason=_finish_reason(choice["finish_reason"]),
            versions=_spans(choice.get("weight_versions"), versions),
        )
        return cut_at_stop(whole, sampling, self.decode)


def cut_at_stop(
    completion: Completion, sampling: SamplingParams, decode: Callable[[Sequence[int]], str] | None
) -> Completion:
    """A completion up to the token that completes a stop text, where one does: servers look in their own ways."""
    if not sampling.stop or decode is None:
        return completion
    end = stop_text_end(decode, completion.token_ids, sampling.min_tokens, sampling.stop)
    return completion if end is None else shortened(completion, end, "stop")


def shortened(completion: Completion, end: int, reason: FinishReason) -> Completion:
    """The first ``end`` tokens of a completion."""
    return dataclasses.replace(
        completion,
        token_ids=completion.token_ids[:end],
        logprobs=None if completion.logprobs is None else completion.logprobs[:end],
        sampled_logprobs=None if completion.sampled_logprobs is None else completion.sampled_logprobs[:end],
        finish_reason=reason,
        versions=tuple(span for span in completion.versions if span[0] < max(end, 1)),
    )


def joined(first: Completion, rest: Completion) -> Completion:
    """Two stretches of one completion as one."""
    count = len(first.token_ids)
    both = (rest.logprobs, first.logprobs), (rest.sampled_logprobs, first.sampled_logprobs)
    logprobs, sampled = (None if a is None or b is None else np.concatenate([b, a]) for a, b in both)
    versions = list(first.versions)
    versions += [(start + count, v) for start, v in rest.versions if start > 0 or v != versions[-1][1]]
    return Completion(
        token_ids=[*first.token_ids, *rest.token_ids],
        logprobs=logprobs,
        sampled_logprobs=sampled,
        finish_reason=rest.finish_reason,
        versions=tuple(versions),
    )


def unfinished(version: int, has_logprobs: bool) -> Completion:
    """A completion of no tokens: its request was given up before it was sent."""
    none = np.zeros(0, np.float32)
    return Completion(
        token_ids=[],
        logprobs=none if has_logprobs else None,
        sampled_logprobs=none,
        finish_reason="abort",
        versions=((0, version),),
    )


def request_seed(sampling: SamplingParams, request: Request, place: int, *more: int) -> int:
    """A seed of 62 bits that depends on the sampling's, the request's (else its place), and ``more`` alone."""
    own = place if request.seed is None else request.seed
    # Words of 32 bits, and their number: a larger one would take two, and missing ones count as zeros.
    words = [sampling.seed, own, own >> 32, int(request.seed is None), len(more), *more]
    entropy = [word & 0xFFFFFFFF for word in words]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 2


def _finish_reason(reason: str | None) -> FinishReason:
    reasons: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
    return reasons.get(reason, "abort")


def _spans(spans: Sequence[dict[str, Any]] | None, versions: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The server's own spans where it has them; else the version that held throughout."""
    if spans:
        return tuple((int(span["start"]), int(span["version"])) for span in spans)
    before, after = versions
    if before != after:
        raise EngineError(f"the weights changed from version {before} to {after} while a request ran")
    return ((0, int(after)),)
