"""Host side of the native engine: which completion is in which slot, and what it has drawn so far."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxrft.rollout.buckets import PromptShapes
from jaxrft.rollout.records import Completion, FinishReason, Request, SamplingParams
from jaxrft.rollout.slots import Placement
from jaxrft.rollout.stopping import stop_text_end

EMPTY = -1


@dataclasses.dataclass
class Group:
    """The completions of one request that have no slot yet."""

    prompt: np.ndarray
    seed: int
    limit: int
    first: int  # place in the list of completions of the sample 0
    n: int
    placed: int = 0
    row: int = 0  # where its prompt stands in what was prefilled

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return self.n - self.placed


class Scheduler:
    """Slots, the queue before them, and the completions that came out.

    Args:
        requests: what to complete.
        sampling: how.
        slots: completions generated at the same time.
        max_length: tokens of prompt and completion together at most.
        stop_ids: every token that ends a completion.
        decode: text of a list of tokens, for stop texts.
        version: of the weights.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        slots: int,
        max_length: int,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None,
        version: int,
    ):
        self._sampling, self._stop_ids, self._decode, self._version = sampling, set(stop_ids), decode, version
        self.queue: collections.deque[Group] = collections.deque()
        total = 0
        for place, request in enumerate(requests):
            prompt = np.asarray(request.prompt_ids, np.int32)
            limit = min(sampling.max_tokens, max_length - len(prompt))
            seed = place if request.seed is None else request.seed
            self.queue.append(Group(prompt, seed, limit, total, request.n))
            total += request.n
        self.completions: list[Completion | None] = [None] * total
        self.finished = 0
        counts = [request.n for request in requests]
        self._request_of = np.repeat(np.arange(len(counts)), counts)  # of each completion
        self._left = counts  # completions of each request that have not ended
        self._whole: list[int] = []
        self.ended = np.zeros(slots, bool)  # stopped by the host, not yet told to the device
        longest = max((group.limit for group in self.queue), default=0)
        self._owner = np.full(slots, EMPTY, np.int32)
        self._length, self._limit, self._drawn, self._booked = np.zeros((4, slots), np.int32)
        self._tokens = np.zeros((slots, longest), np.int32)
        self._logprobs, self._sampled = np.zeros((2, slots, longest), np.float32)

    @property
    def slots(self) -> int:
        """Completions generated at the same time."""
        return len(self._owner)

    @property
    def free(self) -> Int[np.ndarray, "free"]:
        """Slots that no completion is in."""
        return np.flatnonzero(self._owner == EMPTY)

    def next_prompts(self, shapes: PromptShapes) -> list[Group]:
        """The first groups of the queue that the free slots can start, as many as are run together."""
        groups: list[Group] = []
        room, longest = len(self.free), 0
        for group in self.queue:
            longer = max(longest, len(group.prompt))
            if groups and (room <= 0 or len(groups) >= shapes.most(longer)):
                break
            groups.append(group)
            room, longest = room - group.waiting, longer
        for row, group in enumerate(groups):
            group.row = row
        return groups

    def place(self, groups: list[Group]) -> Placement:
        """Fills free slots from ``groups``, in order; what is placed whole leaves ``groups`` and the queue."""
        fields = np.full((len(Placement._fields), self.slots), -1, np.int32)
        free = list(self.free)
        while groups and free:
            group = groups[0]
            count = min(group.waiting, len(free))
            slots, free = free[:count], free[count:]
            samples = np.arange(group.placed, group.placed + count)
            seed = np.uint32(group.seed & 0xFFFFFFFF).view(np.int32)
            fields[:, slots] = np.broadcast_arrays(group.row, len(group.prompt), group.limit, seed, samples)
            self._owner[slots] = group.first + samples
            self._length[slots], self._limit[slots] = len(group.prompt), group.limit
            self._drawn[slots] = self._booked[slots] = 0
            self.ended[slots] = False
            group.placed += count
            if group.waiting == 0:
                groups.pop(0)
                self.queue.popleft()
        return Placement(*fields)

    def cached_after(self, steps: int) -> int:
        """Tokens that the longest live slot has in the caches once ``steps`` more are drawn: all but the newest."""
        cached = self._length + self._booked_after(steps) - 1
        return int(cached[self._owner != EMPTY].max(initial=0))

    def book(self, steps: int) -> Int[np.ndarray, "slots"] | None:
        """Counts on a chunk of ``steps`` more tokens for every slot.

        Returns:
            Which completion is in each slot; None where the chunks booked before finish all of them.
        """
        if not ((self._owner != EMPTY) & (self._booked < self._limit)).any():
            return None
        self._booked = self._booked_after(steps)
        return self._owner.copy()

    def _booked_after(self, steps: int) -> Int[np.ndarray, "slots"]:
        # The first chunk of a completion also brings the token that its prompt gave.
        return np.minimum(self._booked + steps + (self._booked == 0), self._limit)

    def take(self, packed: Int[np.ndarray, "rows slots"], owner: Int[np.ndarray, "slots"], steps: int) -> None:
        """Reads what a chunk drew: ``packed`` as the decode program returns it, ``owner`` as when it was booked."""
        same = (owner == self._owner) & (owner != EMPTY)
        produced, done = packed[-2], packed[-1].astype(bool) & same
        # Row 0 holds the newest token at the chunk's start, which only fresh slots have not given yet.
        first = np.where(self._drawn == 0, 0, 1)
        count = np.where(same, produced - self._drawn, 0)
        row = np.arange(steps + 1)[:, None]
        rows, slots = np.nonzero((row >= first) & (row < first + count))
        columns = self._drawn[slots] + rows - first[slots]
        parts = packed[: 3 * (steps + 1)].reshape(3, steps + 1, -1)
        self._tokens[slots, columns] = parts[0, rows, slots]
        self._logprobs[slots, columns] = parts[1].view(np.float32)[rows, slots]
        self._sampled[slots, columns] = parts[2].view(np.float32)[rows, slots]
        before = self._drawn.copy()
        self._drawn = np.where(same, produced, self._drawn)
        if self._sampling.stop:
            self._apply_stop_texts(same, before, done)
        for slot in np.flatnonzero(done).tolist():
            self._finish(slot, self._reason(slot))

    def _apply_stop_texts(self, same: Bool[np.ndarray, "slots"], before: np.ndarray, done: np.ndarray) -> None:
        assert self._decode is not None
        for slot in np.flatnonzero(same).tolist():
            tokens = self._tokens[slot, : self._drawn[slot]].tolist()
            seen = max(int(before[slot]), self._sampling.min_tokens)
            end = stop_text_end(self._decode, tokens, seen, self._sampling.stop)
            if end is not None:
                self._drawn[slot] = end
                self.ended[slot], done[slot] = not done[slot], False
                self._finish(slot, "stop")

    def _reason(self, slot: int) -> FinishReason:
        return "stop" if int(self._tokens[slot, self._drawn[slot] - 1]) in self._stop_ids else "length"

    def _finish(self, slot: int, reason: FinishReason) -> None:
        count = self._drawn[slot]
        self.completions[self._owner[slot]] = Completion(
            token_ids=self._tokens[slot, :count].tolist(),
            logprobs=self._logprobs[slot, :count].copy(),
            sampled_logprobs=self._sampled[slot, :count].copy(),
            finish_reason=reason,
            versions=((0, self._version),),
        )
        request = int(self._request_of[self._owner[slot]])
        self._left[request] -= 1
        if self._left[request] == 0:
            self._whole.append(request)
        self._owner[slot] = EMPTY
        self.finished += 1

    def pop_whole(self) -> Iterator[tuple[int, list[Completion]]]:
        """The requests whose last completion has ended since the last call, with all of their completions."""
        whole, self._whole = self._whole, []
        for request in whole:
            first, stop = np.searchsorted(self._request_of, (request, request + 1))
            yield request, [c for c in self.completions[first:stop] if c is not None]


def pad_prompts(
    groups: Sequence[Group], shapes: PromptShapes
) -> tuple[Int[np.ndarray, "prompts time"], Int[np.ndarray, "prompts"]]:
    """Right-padded prompts and their lengths."""
    rows, time = shapes.padded(len(groups), max(len(group.prompt) for group in groups))
    tokens, lengths = np.zeros((rows, time), np.int32), np.ones(rows, np.int32)
    for row, group in enumerate(groups):
        lengths[row] = len(group.prompt)
        tokens[row, : lengths[row]] = group.prompt
    return tokens, lengths
