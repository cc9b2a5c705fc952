"""One call of ``generate``: admit what waits, decode chunks, take out what has ended."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrft.rollout.buckets import PromptShapes, cache_bucket, whole_cache
from jaxrft.rollout.programs import Caches, Prefilled, Programs
from jaxrft.rollout.records import OnFinished, SamplingParams
from jaxrft.rollout.sampling import modes, sampling_values
from jaxrft.rollout.scheduler import Group, Scheduler, pad_prompts
from jaxrft.rollout.slots import SlotState
from jaxrft.rollout.weights import Leaf


class Loop:
    """Drives a scheduler's slots on the device. Caches live as long as this does.

    Args:
        programs, leaves: the model.
        dtype: that it computes in.
        scheduler: the requests and their slots.
        sampling: how to draw, with the engine's end-of-sequence tokens.
        steps: tokens that a chunk decodes.
        max_length: tokens of prompt and completion together at most.
        grows: whether caches are as long as the longest live slot needs, else as long as any may need.
        shapes: of the prompts that are run together.
    """

    def __init__(
        self,
        programs: Programs,
        leaves: tuple[jax.Array, ...],
        scheduler: Scheduler,
        sampling: SamplingParams,
        eos_ids: tuple[int, ...],
        *,
        dtype: Any,
        steps: int,
        max_length: int,
        grows: bool,
        shapes: PromptShapes,
    ):
        self._programs, self._given, self._dtype, self._scheduler = programs, leaves, dtype, scheduler
        self._steps, self._max_length, self._shapes = steps, max_length, shapes
        self._grows = grows
        self._values = sampling_values(sampling, eos_ids)
        self._first_mode, self._mode = modes(sampling)
        self._state: SlotState | None = None  # with the engine's own parameters and caches, from the first prompts on
        self._leaves: tuple[Leaf, ...] = ()
        self._caches: Caches = []
        self._groups: list[Group] = []  # those of self._prompts that wait for slots
        self._prompts: Prefilled | None = None
        self._unread: collections.deque[tuple[jax.Array, np.ndarray]] = collections.deque()

    def run(self, on_progress: Callable[[int, int], None] | None, on_finished: OnFinished | None = None) -> None:
        """Runs until every completion is there; arguments as of the engine's ``generate``."""
        scheduler = self._scheduler
        total = len(scheduler.completions)
        while scheduler.finished < total:
            while scheduler.queue and len(scheduler.free):
                self._admit()
            decoding = self._decode()
            # With nothing left to put in, the device decodes the next chunk while the host reads this one.
            if scheduler.queue or not decoding or len(self._unread) > 1:
                packed, owner = self._unread.popleft()
                scheduler.take(np.asarray(packed), owner, self._steps)
                for place, completions in scheduler.pop_whole():
                    if on_finished is not None:
                        on_finished(place, completions)
                if on_progress is not None:
                    on_progress(scheduler.finished, total)

    def _admit(self) -> None:
        """Starts completions in free slots; runs their prompts, unless that was done for others of the group."""
        batch = None
        if not self._groups:
            self._groups = self._scheduler.next_prompts(self._shapes)
            batch = pad_prompts(self._groups, self._shapes)
        placement = self._scheduler.place(self._groups)
        state = self._fit_caches(self._scheduler.cached_after(self._steps))
        if batch is not None:
            self._prompts = self._programs.prefill(self._leaves, *batch, self._shapes)
        assert self._prompts is not None
        self._state, self._caches = self._programs.admit(
            state, self._caches, self._prompts, placement, self._values, self._first_mode
        )
        if not self._groups:
            self._prompts = None

    def _decode(self) -> bool:
        """Starts a chunk; False where the chunks that were started before finish everything."""
        owner = self._scheduler.book(self._steps)
        if owner is None:
            return False
        state = self._fit_caches(self._scheduler.cached_after(0))
        self._state, self._caches, packed = self._programs.decode(
            self._leaves,
            state,
            self._caches,
            self._scheduler.ended.copy(),
            self._values,
            steps=self._steps,
            mode=self._mode,
        )
        self._unread.append((packed, owner))
        return True

    def _fit_caches(self, length: int) -> SlotState:
        length = cache_bucket(length, self._max_length) if self._grows else whole_cache(self._max_length)
        if self._state is None:
            self._leaves, self._state, self._caches = self._programs.begin(
                self._given, self._values, slots=self._scheduler.slots, length=length, dtype=self._dtype
            )
        elif self._caches[0].key.shape[2] != length:
            self._caches = self._programs.resize(self._caches, length)
        return self._state
