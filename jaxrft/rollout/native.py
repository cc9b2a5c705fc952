"""The embedded engine: generates from the trainer's own parameters, in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from jaxrft.config.base import ConfigError
from jaxrft.rollout import programs
from jaxrft.rollout.records import Completion, Request, SamplingParams
from jaxrft.rollout.sampling import modes, sampling_values, stop_token_ids
from jaxrft.rollout.scheduler import Group, Scheduler, bucket, pad_prompts, power_of_two

TAGS = ("weights", "kv_cache")


class NativeEngine:
    """Generates completions in slots that are refilled as they end.

    It holds the parameters it is given by reference and copies nothing: after a step that donates
    them, hand the new ones over with :meth:`update_weights`.

    Each prompt is run once for all completions of its request. Then chunks of ``decode_chunk`` tokens are
    decoded for all slots; between them the host takes out what has ended and puts in what waits. A chunk
    attends to a bucket (16, 24, 32, 48, 64, ...) of cached tokens that holds the longest live slot. A
    completion ends with finish reason ``length`` when prompt and completion fill ``max_length``.

    Args:
        model: a :class:`jaxrft.models.Decoder`.
        tokenizer: gives the end-of-sequence token, and text to look for stop texts in.
        max_slots: completions generated at the same time.
        max_length: tokens of prompt and completion together at most; the caches have room for this many.
        decode_chunk: tokens decoded before the host looks at what has ended.
        max_prefill_tokens: prompt tokens, padding included, that are run at once where there are several prompts.
        eos_token_ids: end-of-sequence tokens; None takes the tokenizer's.

    Attributes:
        version: of the weights that completions come from.
        compilations: programs that this engine had to compile.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Any = None,
        max_slots: int = 64,
        max_length: int = 1024,
        *,
        decode_chunk: int = 8,
        max_prefill_tokens: int = 8192,
        eos_token_ids: Sequence[int] | None = None,
    ):
        numbers = {"max_slots": max_slots, "decode_chunk": decode_chunk, "max_prefill_tokens": max_prefill_tokens}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name}: got {value!r}, takes an integer of at least 1")
        if max_length < 2:
            raise ConfigError(f"max_length: got {max_length!r}, takes at least 2: a prompt token and a drawn one")
        graphdef, params = nnx.split(model)
        self._leaves: tuple[Any, ...] | None = None
        leaves, self._treedef = jax.tree.flatten(params)
        self._leaves = tuple(leaves)
        self._programs = programs.programs_of(graphdef, self._treedef)
        self._vocab_size = model.spec.vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = _eos_ids(tokenizer) if eos_token_ids is None else tuple(eos_token_ids)
        self._max_slots, self._max_length = max_slots, max_length
        self._steps, self._max_prefill_tokens = decode_chunk, max_prefill_tokens
        self._asleep: set[str] = set()
        self._closed = False
        self.version = 0
        self.compilations = 0

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Completions of all requests: those of the first request first, each request's in order.

        Args:
            requests: prompts, each with the number of completions wanted of it.
            sampling: how to draw them.
            on_progress: called now and then with (completions done, completions in all).

        Raises:
            ConfigError: a prompt is too long or holds a token outside of the vocabulary, or stop texts are
                asked for without a tokenizer.
            RuntimeError: the engine is closed, asleep, or its weights were deleted.
        """
        leaves = self._ready_weights()
        self._check(requests, sampling)
        if not requests:
            return []
        total = sum(request.n for request in requests)
        scheduler = Scheduler(
            requests,
            sampling,
            slots=min(self._max_slots, power_of_two(total)),
            max_length=self._max_length,
            stop_ids=stop_token_ids(sampling, self._eos_ids),
            decode=self._text,
            version=self.version,
        )
        before = len(self._programs.compiled)
        try:
            self._run(leaves, scheduler, sampling, on_progress)
        finally:
            self.compilations += len(self._programs.compiled) - before
        return [completion for completion in scheduler.completions if completion is not None]

    def update_weights(self, params: Any, version: int) -> None:
        """Generates from ``params`` from now on: the model's state, as ``nnx.split`` gives it. Copies nothing.

        Raises:
            ConfigError: they are not the state of this engine's model.
            RuntimeError: the engine is closed.
        """
        self._refuse_closed()
        leaves, treedef = jax.tree.flatten(params)
        if treedef != self._treedef:
            raise ConfigError("params: not the state of this engine's model; pass the second result of nnx.split(model)")
        self._leaves, self.version = tuple(leaves), version

    def sleep(self, level: int = 1) -> None:
        """Gives back the memory of the caches (level 1), and lets go of the weights too (level 2)."""
        self._refuse_closed()
        if level not in (1, 2):
            raise ConfigError(f"level: got {level!r}, takes 1 (caches) or 2 (caches and weights)")
        self._asleep.add("kv_cache")
        if level == 2:
            self._leaves = None
            self._asleep.add("weights")

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Takes back what ``sleep`` gave: ``weights``, ``kv_cache``, or both (None).

        Weights that were let go of come back with the next :meth:`update_weights`.
        """
        self._refuse_closed()
        unknown = set(tags or ()) - set(TAGS)
        if unknown:
            raise ConfigError(f"tags: got {sorted(unknown)}, takes {' and '.join(TAGS)}")
        self._asleep -= set(TAGS if tags is None else tags)

    def close(self) -> None:
        """Lets go of weights and caches; the engine cannot be used after."""
        self._leaves = None
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, leaves, scheduler, sampling, on_progress) -> None:
        values = sampling_values(sampling, self._eos_ids)
        first_mode, mode = modes(sampling)
        slots, total = scheduler.slots, len(scheduler.completions)
        state = programs.empty_state(slots, values.key)
        caches: programs.Caches | None = None
        groups: list[Group] = []
        pending: list[tuple[jax.Array, np.ndarray]] = []
        while scheduler.finished < total:
            while scheduler.queue and len(scheduler.free):
                if not groups:
                    groups = scheduler.next_prompts(self._max_prefill_tokens)
                    prompts = self._programs.prefill(leaves, *pad_prompts(groups, self._max_length))
                placement = scheduler.place(groups)
                state = self._programs.place(state, prompts.logits, placement, values, first_mode)
                caches = self._fit(leaves, caches, scheduler, slots)
                caches = self._programs.copy(caches, prompts.caches, placement[0])
            owner = scheduler.book(self._steps)
            if owner is not None:
                caches = self._fit(leaves, caches, scheduler, slots)
                state, caches, packed = self._programs.decode(
                    leaves, state, caches, scheduler.ended.copy(), values, steps=self._steps, mode=mode
                )
                pending.append((packed, owner))
            # With nothing left to put in, the device decodes the next chunk while the host reads this one.
            if scheduler.queue or owner is None or len(pending) > 1:
                packed, owner = pending.pop(0)
                scheduler.take(np.asarray(packed), owner, self._steps)
                if on_progress is not None:
                    on_progress(scheduler.finished, total)

    def _fit(self, leaves, caches, scheduler, slots) -> programs.Caches:
        """Caches that are as long as the longest live slot will be after what is booked."""
        length = bucket(scheduler.cached, self._max_length)
        if caches is None:
            return self._programs.empty(leaves, slots, length)
        return caches if caches[0].key.shape[2] == length else self._programs.resize(caches, length)

    def _ready_weights(self) -> tuple[Any, ...]:
        self._refuse_closed()
        if self._asleep:
            raise RuntimeError(f"the engine is asleep ({', '.join(sorted(self._asleep))}): call wake() before generate()")
        if self._leaves is None:
            raise RuntimeError("the engine let go of its weights in sleep(level=2): call update_weights(params, version)")
        if any(leaf.is_deleted() for leaf in self._leaves):
            raise RuntimeError(
                "the engine's weights were deleted, as a step does that donates them: "
                "call update_weights(params, version) after each step"
            )
        return self._leaves

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed: make a new one")

    def _check(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        if sampling.stop and self._tokenizer is None:
            raise ConfigError("stop: texts need an engine with a tokenizer; pass tokenizer=, or use stop_token_ids")
        for place, request in enumerate(requests):
            length = len(request.prompt_ids)
            if length >= self._max_length:
                raise ConfigError(
                    f"request {place}: its prompt has {length} tokens, this engine takes at most "
                    f"{self._max_length - 1}: shorten the prompt, or make the engine with a larger max_length"
                )
            if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocab_size:
                raise ConfigError(
                    f"request {place}: its prompt holds a token outside of the model's vocabulary of "
                    f"{self._vocab_size}: use the model's own tokenizer"
                )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _eos_ids(tokenizer: Any) -> tuple[int, ...]:
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)
