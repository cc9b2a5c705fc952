"""Rewards that are called while other completions are still generated."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from jaxrft.rewards.calls import RewardPart
from jaxrft.rewards.combine import RewardSet
from jaxrft.rewards.records import PartScores
from jaxrft.rollout.records import Completion
from jaxrft.training.call_thread import CallThread

Item = TypeVar("Item")

# So long at most until somebody who waits for rewards is heard, by Ctrl-C for instance.
WAIT_SECONDS = 0.2

# Parts of a rollout that are with async rewards at a time; groups that end meanwhile wait, and make up one part. With
# one, the last groups would wait for the answer to others first. Without a limit, every bound that a reward sets within
# a call, on requests for instance, would be multiplied by the groups.
PARTS_AT_A_TIME = 8

# What the rewards are called with for groups, given as their places in the rollout and their completions.
MakePart = Callable[[list[int], list[Completion]], RewardPart]


class _Scored(NamedTuple):
    """What a part of the rollout got, and when."""

    outcome: tuple[list[str], PartScores] | BaseException  # the texts too
    begin: float
    end: float


class Overlap:
    """The groups of one rollout on their way through the rewards, used in a ``with`` block.

    All is done by one caller but for the scoring, which other threads do: one calls the rewards, and each part whose
    async rewards run has one that waits for them, so that a slow answer holds up no other part and hides no error. They
    share queues alone: these stay whole where a time-out or Ctrl-C comes up in the middle of any line. At the end of
    the block, what no call has begun with is dropped, async rewards that run are cancelled, and another one that runs
    is not waited for.

    Args:
        calls: where rewards are called.
        make_part: of the groups that have been finished since it was last called.
        rewards: score it.
    """

    def __init__(self, calls: CallThread, make_part: MakePart, rewards: RewardSet):
        self._calls, self._make_part, self._rewards = calls, make_part, rewards
        self._finished: queue.SimpleQueue[tuple[int, list[Completion]]] = queue.SimpleQueue()
        self._room = threading.Semaphore(PARTS_AT_A_TIME)
        self._parts: list[RewardPart] = []
        self._outcomes: queue.SimpleQueue[_Scored] = queue.SimpleQueue()
        self._scored: list[_Scored] = []
        self._added, self._samples = 0, 0
        self._texts: dict[int, str] = {}
        self._dropped = False
        self.parts: list[PartScores] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropped = True
        for part in self._parts:
            part.cancel()

    def add(self, group: int, completions: list[Completion]) -> None:
        """Takes a finished group, by its place in the rollout; returns at once."""
        self._added += len(completions)
        self._finished.put((group, completions))
        self._calls.submit(self._call)

    def check(self) -> None:
        """Raises what a reward has raised."""
        for scored in _all_of(self._outcomes):
            self._take(scored)

    def wait(self, on_progress: Callable[[int], None]) -> list[str]:
        """Waits for the scores of all groups that were added, which are in :attr:`parts` then.

        Args:
            on_progress: called again and again with the samples that are scored; what it raises ends the waiting.

        Returns:
            The text of each sample.
        """
        self.check()
        while self._samples < self._added:
            on_progress(self._samples)
            with contextlib.suppress(queue.Empty):
                self._take(self._outcomes.get(timeout=WAIT_SECONDS))
        on_progress(self._samples)
        return [self._texts[place] for place in sorted(self._texts)]

    def seconds_before(self, moment: float) -> float:
        """Seconds in which any reward ran before a moment of ``time.perf_counter``."""
        seconds, counted = 0.0, -math.inf
        for scored in sorted(self._scored, key=lambda scored: scored.begin):
            begin, end = max(scored.begin, counted), min(scored.end, moment)
            seconds += max(0.0, end - begin)
            counted = max(counted, end)
        return seconds

    def _take(self, scored: _Scored) -> None:
        if isinstance(scored.outcome, BaseException):
            raise scored.outcome
        texts, part = scored.outcome
        self._scored.append(scored)
        self.parts.append(part)
        self._texts |= zip(part.places, texts)
        self._samples += len(texts)

    # ------------------------------------------------------------------ in the threads

    def _call(self) -> None:
        """Calls rewards for the groups that wait; those that an earlier call of this took are no longer there."""
        self._room.acquire()
        groups = sorted(_all_of(self._finished), key=lambda group: group[0])
        if self._dropped or not groups:
            self._room.release()
            return
        begin = time.perf_counter()
        try:
            part = self._begin([g for g, _ in groups], [c for _, completions in groups for c in completions])
            if part.running:
                finish = threading.Thread(target=self._finish, args=(part, begin), name="reward answers", daemon=True)
                finish.start()
                return
        except BaseException as error:
            self._end(error, begin)
            return
        self._finish(part, begin)

    def _begin(self, groups: list[int], completions: list[Completion]) -> RewardPart:
        part = self._make_part(groups, completions)
        # Before its rewards are called: it may have to be cancelled while one of them runs.
        self._parts.append(part)
        if self._dropped:  # perhaps too late for the caller to see this part
            part.cancel()
        self._rewards.begin_part(part)
        part.check_wanted()  # nor is one waited for that was cancelled meanwhile
        return part

    def _finish(self, part: RewardPart, begin: float) -> None:
        try:
            self._end((part.samples.texts, self._rewards.finish_part(part)), begin)
        except BaseException as error:
            self._end(error, begin)

    def _end(self, outcome: tuple[list[str], PartScores] | BaseException, begin: float) -> None:
        self._outcomes.put(_Scored(outcome, begin, time.perf_counter()))
        if isinstance(outcome, BaseException):
            # Nobody will ask for the other groups. Not before: a part that is cancelled for it must not be heard first.
            self._dropped = True
        self._room.release()


def _all_of(items: queue.SimpleQueue[Item]) -> Iterator[Item]:
    """What is in a queue now."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield items.get_nowait()
