"""The embedded engine: generates from the trainer's own parameters, in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, cast

import jax
from flax import nnx

from jaxrft.config.base import ConfigError
from jaxrft.models import Decoder
from jaxrft.parallel import Layout
from jaxrft.rollout.buckets import PREFILL_TOKENS, PromptShapes, slots_for, whole_cache
from jaxrft.rollout.checks import check_requests, check_sleep_level, check_stops, tags_to_wake
from jaxrft.rollout.loop import Loop
from jaxrft.rollout.programs import programs_of
from jaxrft.rollout.records import Completion, OnFinished, Request, SamplingParams
from jaxrft.rollout.sampling import eos_ids_of, stop_token_ids
from jaxrft.rollout.scheduler import Scheduler


class NativeEngine:
    """Generates completions in slots that are refilled as they end.

    It holds the parameters it is given by reference and copies nothing: after a step that donates
    them, hand the new ones over with :meth:`update_weights`. Where the model computes in another type, or
    ``quantization`` is on, each :meth:`generate` makes a copy of the matrices for itself.

    Each prompt is run once for all completions of its request. Then chunks of ``decode_chunk`` tokens are
    decoded for all slots; between them the host takes out what has ended and puts in what waits. A chunk
    attends to caches that hold the longest live slot: of ``max_length`` tokens, a half, a quarter or an
    eighth of that, but not below 64, so that few programs are compiled; on a GPU, whose kernel reads no more than a
    slot has, always of ``max_length``. A completion ends with finish reason ``length`` when prompt and completion fill
    ``max_length``.

    Args:
        model: a :class:`jaxrft.models.Decoder`.
        tokenizer: gives the end-of-sequence token, and text to look for stop texts in.
        max_slots: completions generated at the same time, at most; on several devices a multiple of their
            number, and one for each at least.
        max_length: tokens of prompt and completion together at most; the caches have room for this many.
        decode_chunk: tokens decoded before the host looks at what has ended.
        max_prefill_tokens: prompt tokens, padding included, that are run at once; or those of the longest prompt, where
            these are more.
        max_prompt_length: tokens of a prompt at most, where that is known: each is padded to these, rounded up, a half
            or a quarter of them, so that calls of :meth:`generate` with as many prompts and completions run the same
            programs, however long their prompts are. Longer ones are run too. None: the power of two above the longest
            of a call.
        eos_token_ids: end-of-sequence tokens; None takes the tokenizer's.
        quantization: ``fp8`` generates from the layers' kernels in 8-bit floating point. Log-probabilities are then
            those of the quantised model, which completions are drawn from, not the trainer's.

    Attributes:
        version: of the weights that completions come from.
        compilations: programs that this engine had to compile.

    Raises:
        ConfigError: an argument is out of its range.
    """

    keeps_params = True
    sleeps = True
    last_transfer = None

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any = None,
        max_slots: int = 64,
        max_length: int = 1024,
        *,
        decode_chunk: int = 8,
        max_prefill_tokens: int = PREFILL_TOKENS,
        max_prompt_length: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        quantization: Literal["none", "fp8"] = "none",
    ):
        numbers = {"max_slots": max_slots, "decode_chunk": decode_chunk, "max_prefill_tokens": max_prefill_tokens}
        numbers |= {} if max_prompt_length is None else {"max_prompt_length": max_prompt_length}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name}: got {value!r}, takes an integer of at least 1")
        if max_length < 2:
            raise ConfigError(f"max_length: got {max_length!r}, takes at least 2: a prompt token and a drawn one")
        if quantization not in ("none", "fp8"):
            raise ConfigError(f"quantization: got {quantization!r}, takes none or fp8")
        self._quantization = quantization
        self._asleep: set[str] = set()
        self._closed = False
        self._graphdef, params = nnx.split(model)
        self._treedef: Any = jax.tree.structure(params)
        self._leaves: tuple[jax.Array, ...] | None = None
        self.update_weights(params, version=0)
        self._vocab_size, self._dtype = model.spec.vocab_size, jax.numpy.dtype(model.dtype)
        # A kernel that reads what a slot has needs no shorter caches, each of which is programs of its own.
        self._grows = model.reads_whole_caches(whole_cache(max_length))
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids_of(tokenizer) if eos_token_ids is None else tuple(eos_token_ids)
        self._max_slots, self._max_length = max_slots, max_length
        self._steps, self._max_prefill_tokens = decode_chunk, max_prefill_tokens
        self._max_prompt_length = max_prompt_length
        self.compilations = 0

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """Completions of all requests: those of the first request first, each request's in order.

        Args:
            requests: prompts, each with the number of completions wanted of it.
            sampling: how to draw them.
            on_progress: called now and then with (completions done, completions in all).
            on_finished: called with the place of each request and all of its completions, as soon as they are there.
                Both are called between chunks, where a device may wait for them: they should return at once.

        Raises:
            ConfigError: a prompt is too long or holds a token outside of the vocabulary, or stop texts are
                asked for without a tokenizer.
            RuntimeError: the engine is closed, asleep, or its weights were deleted.
        """
        leaves = self._ready_weights()
        stop_ids = stop_token_ids(sampling, self._eos_ids)
        check_requests(requests, max_length=self._max_length, vocab_size=self._vocab_size)
        has_tokenizer = self._tokenizer is not None
        check_stops(sampling, stop_ids, vocab_size=self._vocab_size, has_tokenizer=has_tokenizer)
        if not requests:
            return []
        slots = slots_for(sum(request.n for request in requests), self._max_slots, self._devices)
        scheduler = Scheduler(
            requests,
            sampling,
            slots=slots,
            max_length=self._max_length,
            stop_ids=stop_ids,
            decode=self._text,
            version=self.version,
        )
        before = len(self._programs.compiled)
        try:
            Loop(
                self._programs,
                leaves,
                scheduler,
                sampling,
                self._eos_ids,
                dtype=self._dtype,
                steps=self._steps,
                max_length=self._max_length,
                grows=self._grows,
                shapes=PromptShapes.for_requests(
                    requests,
                    slots=slots,
                    longest=self._max_prompt_length,
                    max_length=self._max_length,
                    max_tokens=self._max_prefill_tokens,
                ),
            ).run(on_progress, on_finished)
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
            raise ConfigError("params: not the state of this engine's model: pass the second result of nnx.split")
        self._leaves, self.version = tuple(leaves), version
        mesh = _mesh_of(leaves[0])
        self._devices = 1 if mesh is None else Layout(mesh).slot_devices
        self._programs = programs_of(self._graphdef, self._treedef, mesh, self._quantization)

    def sleep(self, level: int = 1) -> None:
        """Generates nothing until :meth:`wake`; at level 2 it also lets go of the weights.

        Caches live within :meth:`generate` alone, so that level 1 has no memory to give back.
        """
        self._refuse_closed()
        check_sleep_level(level)
        self._asleep.add("kv_cache")
        if level == 2:
            self._leaves = None
            self._asleep.add("weights")

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Takes back what ``sleep`` gave: ``weights``, ``kv_cache``, or both (None).

        Weights that were let go of come back with the next :meth:`update_weights`.
        """
        self._refuse_closed()
        self._asleep -= set(tags_to_wake(tags))

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

    def _ready_weights(self) -> tuple[Any, ...]:
        self._refuse_closed()
        if self._asleep:
            raise RuntimeError(
                f"the engine is asleep ({', '.join(sorted(self._asleep))}): call wake() before generate()"
            )
        if self._leaves is None:
            raise RuntimeError(
                "the engine let go of its weights in sleep(level=2): call update_weights(params, version)"
            )
        if any(leaf.is_deleted() for leaf in self._leaves):
            raise RuntimeError(
                "the engine's weights were deleted, as a step does that donates them: "
                "call update_weights(params, version) after each step"
            )
        return self._leaves

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed: make a new one")

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _mesh_of(array: jax.Array) -> jax.sharding.Mesh | None:
    """The mesh of several devices that an array lies on."""
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return None
    return cast(jax.sharding.Mesh, sharding.mesh)
