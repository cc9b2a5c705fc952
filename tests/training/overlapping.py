"""An engine, rewards and phases for tests of rewards that overlap with generation."""

import asyncio
import io
import itertools
import threading
import time

import numpy as np

from jaxrft.data.records import Prompt
from jaxrft.rollout.records import Completion, SamplingParams
from jaxrft.tracking import Console
from jaxrft.tracking.timing import PhaseTimer
from jaxrft.training.collector import Collector
from jaxrft.training.phases import Phases

PROMPTS = [Prompt(10 * i, f"p{i}", f"p{i}", [i], {"answer": i}) for i in range(5)]


GROUP = 2


class Engine:
    """Finishes groups in an order of its own; ``between`` is called before each, with how many were finished.

    It works on for ever where ``stuck_at`` are.
    """

    def __init__(self, between=lambda done: None, stuck_at=None):
        self.order, self.between, self.stuck_at = (3, 0, 4, 1, 2), between, stuck_at

    def generate(self, requests, sampling, on_progress=None, on_finished=None):
        groups = [[self._answer(request, i) for i in range(request.n)] for request in requests]
        for done, place in enumerate(self.order):
            self.between(done)
            deadline = time.monotonic() + 20
            while done == self.stuck_at:
                on_progress(done, len(groups))
                assert time.monotonic() < deadline, "nothing has ended it"
            if on_finished is not None:
                on_finished(place, groups[place])
            on_progress(done + 1, len(groups))
        return list(itertools.chain(*groups))

    def _answer(self, request, i):
        tokens = [request.prompt_ids[0], i]
        return Completion(token_ids=tokens, logprobs=np.zeros(2), sampled_logprobs=None, finish_reason="stop")


class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


class Judge:
    """Keeps the answers of each call. With gates it says that a call has begun, and waits to be let on."""

    __name__ = "judge"

    def __init__(self, begun=None, go_on=None, failing=lambda texts: None):
        self.calls, self.begun, self.go_on, self.failing = [], begun, go_on, failing
        self.running = threading.Lock()

    def __call__(self, completions, answer):
        assert self.running.acquire(blocking=False), "called while a call of it runs"
        try:
            self.calls.append(list(answer))
            if self.begun:
                self.begun.set()
                assert self.go_on.wait(20)
            self.failing(completions)
            return [10.0 * a + int(text[-1]) for text, a in zip(completions, answer)]
        finally:
            self.running.release()

    def pop_metrics(self):
        """A number that is no sum over calls."""
        return {"last": float(max(map(max, self.calls)))}


async def patient(completions, answer):
    """Does not apply to odd answers."""
    await asyncio.sleep(0.001)
    return [None if a % 2 else 0.1 * float(text[-1]) for text, a in zip(completions, answer)]


def fragile(completions, answer):
    if 3 in answer:
        raise KeyError("three")
    return [0.7] * len(answer)


class Service:
    """An async reward that answers when it is let; keeps the groups of each call, and what became of it."""

    __name__ = "service"

    def __init__(self):
        self.calls, self.answered, self.running, self.most, self.cancelled = [], [], 0, 0, 0
        self.go_on = threading.Event()

    async def __call__(self, completions, answer):
        self.calls.append(sorted(set(answer)))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.go_on.is_set():
                await asyncio.sleep(0.002)
            self.answered.append(sorted(set(answer)))
            return [float(a) for a in answer]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def wait_for_calls(self, count):
        deadline = time.monotonic() + 20
        while len(self.calls) < count:
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.002)


def phases_of(check=lambda: None):
    return Phases(Console(False, file=io.StringIO()), PhaseTimer(), check=check)


def collect(engine, rewards, overlap=True, phases=None, collector=None):
    collector = collector or Collector(engine, Tokenizer(), rewards, overlap)
    return collector.collect(PROMPTS, GROUP, SamplingParams(), 0, phases or phases_of())


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "has not come about"
        time.sleep(0.002)


def bounded(seconds=20):
    """Phases that end with an error what hangs while somebody waits for rewards."""
    deadline = time.monotonic() + seconds

    def check():
        assert time.monotonic() < deadline, "hangs"

    return phases_of(check)
