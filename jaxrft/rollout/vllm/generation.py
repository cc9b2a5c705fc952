"""Requests and completions on the servers: groups in one request, first tokens at a temperature of their own."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

from jaxrft.rollout.records import Completion, Request, SamplingParams
from jaxrft.rollout.vllm import wire
from jaxrft.rollout.vllm.dispatch import Dispatcher, Generates

# A prompt, how many completions it gets, and their seed.
Job = tuple[Sequence[int], int, int]
Progress = Callable[[int, int], None]


class Generation:
    """Turns requests into what servers are asked, and their answers into completions.

    Args:
        servers: that take any request.
        spoken: how they are talked to.
        max_sequences: completions that a server works on at a time.
    """

    def __init__(self, servers: Sequence[Generates], spoken: wire.Wire, max_sequences: int):
        self._servers, self._wire, self._max_sequences = servers, spoken, max_sequences
        self._dispatcher: Dispatcher | None = None
        self._version = 0
        self._aborted = threading.Event()

    def complete(
        self, requests: Sequence[Request], sampling: SamplingParams, on_progress: Progress, version: int
    ) -> list[Completion]:
        """Completions of all requests, in order; further arguments and errors as of the engine's ``generate``.

        Args:
            requests, sampling, on_progress: what is wanted.
            version: of the weights, for what is given up before a server has answered.
        """
        self._version = version
        self._aborted.clear()
        if sampling.first_token_temperature is not None:
            return self._in_two(requests, sampling, on_progress)
        jobs = [(r.prompt_ids, r.n, wire.request_seed(sampling, r, i)) for i, r in enumerate(requests)]
        return self._answer(jobs, sampling, on_progress)

    def abort(self) -> None:
        """Ends what runs, in another thread: requests answer with what they have."""
        self._aborted.set()
        if (dispatcher := self._dispatcher) is not None:
            dispatcher.abort()

    def _answer(self, jobs: Sequence[Job], sampling: SamplingParams, on_progress: Progress) -> list[Completion]:
        total, done = sum(n for _, n, _ in jobs), 0

        def answered(place: int) -> None:
            nonlocal done
            done += jobs[place][1]
            on_progress(done, total)

        largest = max(n for _, n, _ in jobs)
        # Twice what a server works on: a group keeps its request until its longest completion has ended, and places
        # that get free meanwhile are for the next.
        in_flight = max(1, 2 * self._max_sequences // largest)
        self._dispatcher = Dispatcher(self._servers, in_flight)
        if self._aborted.is_set():
            return self._given_up(jobs, sampling)
        payloads = [self._wire.payload(prompt, n, seed, sampling) for prompt, n, seed in jobs]
        try:
            answers = self._dispatcher.run(payloads, answered, lambda: on_progress(done, total))
        finally:
            self._dispatcher = None
        completions = []
        for (_, n, _), answer in zip(jobs, answers):
            if answer is None or (self._aborted.is_set() and len(answer["choices"]) < n and sampling.temperature > 0):
                completions += self._given_up([((), n, 0)], sampling)
            else:
                completions += self._wire.completions(answer, n, sampling)
        return completions

    def _given_up(self, jobs: Sequence[Job], sampling: SamplingParams) -> list[Completion]:
        known = wire.knows_logprobs(self._wire.mode, sampling)
        return [wire.unfinished(self._version, known)] * sum(n for _, n, _ in jobs)

    def _in_two(self, requests: Sequence[Request], sampling: SamplingParams, on_progress: Progress) -> list[Completion]:
        """First tokens at their own temperature, then the rest of each completion (FIRE sampling)."""
        first, rest = in_two(sampling)
        jobs = [(r.prompt_ids, r.n, wire.request_seed(sampling, r, i, 0)) for i, r in enumerate(requests)]
        completions = self._answer(jobs, first, lambda done, total: on_progress(0, total))
        going: list[int] = []
        rest_jobs: list[Job] = []
        origins = [(i, request, member) for i, request in enumerate(requests) for member in range(request.n)]
        for place, (i, request, member) in enumerate(origins):
            prompt = [*request.prompt_ids, *completions[place].token_ids]
            ended = completions[place].finish_reason != "length" or len(prompt) >= self._wire.max_length
            if not ended and sampling.max_tokens > 1:
                going.append(place)
                rest_jobs.append((prompt, 1, wire.request_seed(sampling, request, i, 1, member)))
        if not going:
            return completions
        over, total = len(completions) - len(going), len(completions)
        rests = self._answer(rest_jobs, rest, lambda done, _: on_progress(over + done, total))
        for place, more in zip(going, rests):
            both = wire.joined(completions[place], more)
            completions[place] = wire.cut_at_stop(both, sampling, self._wire.decode)
        return completions


def in_two(sampling: SamplingParams) -> tuple[SamplingParams, SamplingParams]:
    """How the first token of a completion is drawn, and how the others are."""
    assert sampling.first_token_temperature is not None
    first = dataclasses.replace(
        sampling,
        temperature=sampling.first_token_temperature,
        first_token_temperature=None,
        max_tokens=1,
        min_tokens=min(sampling.min_tokens, 1),
    )
    rest = dataclasses.replace(
        sampling,
        first_token_temperature=None,
        max_tokens=max(sampling.max_tokens - 1, 1),
        min_tokens=max(sampling.min_tokens - 1, 0),
    )
    return first, rest
