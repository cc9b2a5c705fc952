"""Requests and completions on the servers: groups in one request, first tokens at a temperature of their own."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence

from jaxrft.rollout.records import Completion, OnFinished, Request, SamplingParams
from jaxrft.rollout.vllm import wire
from jaxrft.rollout.vllm.dispatch import Answer, Dispatcher, Generates

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
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_progress: Progress,
        on_finished: OnFinished,
        version: int,
    ) -> list[Completion]:
        """Completions of all requests, in order; further arguments and errors as of the engine's ``generate``.

        Args:
            requests, sampling, on_progress, on_finished: what is wanted.
            version: of the weights, for what is given up before a server has answered.
        """
        self._version = version
        self._aborted.clear()
        if sampling.first_token_temperature is not None:
            return self._in_two(requests, sampling, on_progress, on_finished)
        jobs = [(r.prompt_ids, r.n, wire.request_seed(sampling, r, i)) for i, r in enumerate(requests)]
        return self._answer(jobs, sampling, on_progress, on_finished)

    def abort(self) -> None:
        """Ends what runs, in another thread: requests answer with what they have."""
        self._aborted.set()
        if (dispatcher := self._dispatcher) is not None:
            dispatcher.abort()

    def _answer(
        self, jobs: Sequence[Job], sampling: SamplingParams, on_progress: Progress, on_finished: OnFinished
    ) -> list[Completion]:
        total, done = sum(n for _, n, _ in jobs), 0
        finished: dict[int, list[Completion]] = {}

        def answered(place: int, answer: Answer | None) -> None:
            nonlocal done
            # Read as it comes: while others are generated, the time that this takes costs nothing.
            finished[place] = self._read(jobs[place][1], answer, sampling)
            done += jobs[place][1]
            on_finished(place, finished[place])
            on_progress(done, total)

        largest = max(n for _, n, _ in jobs)
        # Twice what a server works on: a group keeps its request until its longest completion has ended, and places
        # that get free meanwhile are for the next.
        in_flight = max(1, 2 * self._max_sequences // largest)
        self._dispatcher = Dispatcher(self._servers, in_flight)
        try:
            if not self._aborted.is_set():
                payloads = [self._wire.payload(prompt, n, seed, sampling) for prompt, n, seed in jobs]
                self._dispatcher.run(payloads, answered, lambda: on_progress(done, total))
        finally:
            self._dispatcher = None
        for place in range(len(jobs)):
            if place not in finished:
                answered(place, None)
        return [completion for place in range(len(jobs)) for completion in finished[place]]

    def _read(self, n: int, answer: Answer | None, sampling: SamplingParams) -> list[Completion]:
        """The completions of an answer; given up where an abort left none, or fewer than were asked for."""
        if answer is None or (self._aborted.is_set() and len(answer["choices"]) < n and sampling.temperature > 0):
            return [wire.unfinished(self._version, wire.knows_logprobs(self._wire.mode, sampling))] * n
        return self._wire.completions(answer, n, sampling)

    def _in_two(
        self, requests: Sequence[Request], sampling: SamplingParams, on_progress: Progress, on_finished: OnFinished
    ) -> list[Completion]:
        """First tokens at their own temperature, then the rest of each completion (FIRE sampling)."""
        first, rest = in_two(sampling)
        jobs = [(r.prompt_ids, r.n, wire.request_seed(sampling, r, i, 0)) for i, r in enumerate(requests)]
        completions = self._answer(jobs, first, lambda done, total: on_progress(0, total), _nothing)
        going: list[int] = []
        rest_jobs: list[Job] = []
        origins = [(i, request, member) for i, request in enumerate(requests) for member in range(request.n)]
        for place, (i, request, member) in enumerate(origins):
            prompt = [*request.prompt_ids, *completions[place].token_ids]
            ended = completions[place].finish_reason != "length" or len(prompt) >= self._wire.max_length
            if not ended and sampling.max_tokens > 1:
                going.append(place)
                rest_jobs.append((prompt, 1, wire.request_seed(sampling, request, i, 1, member)))
        left = collections.Counter(origins[place][0] for place in going)
        starts = list(itertools.accumulate((request.n for request in requests), initial=0))

        def finish(i: int) -> None:
            on_finished(i, completions[starts[i] : starts[i + 1]])

        def answered(job: int, more: list[Completion]) -> None:
            place = going[job]
            both = wire.joined(completions[place], more[0])
            completions[place] = wire.cut_at_stop(both, sampling, self._wire.decode)
            i = origins[place][0]
            left[i] -= 1
            if left[i] == 0:
                finish(i)

        for i in range(len(requests)):
            if left[i] == 0:
                finish(i)
        if going:
            over, total = len(completions) - len(going), len(completions)
            self._answer(rest_jobs, rest, lambda done, _: on_progress(over + done, total), answered)
        return completions


def _nothing(place: int, completions: list[Completion]) -> None:
    pass


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
