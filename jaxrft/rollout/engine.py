"""The contract of every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from jaxrft.rollout.records import Completion, OnFinished, Request, SamplingParams
from jaxrft.rollout.transfer.send import Report


class Engine(Protocol):
    """Generates completions from the weights it was last given.

    Attributes:
        version: of those weights; None before the first.
        keeps_params: whether it generates from the very arrays it is given, which then have to be whole but for tensor
            parallelism; else it has a copy, and takes arrays as they are sharded for training.
        last_transfer: seconds, bytes and buckets of the last ``update_weights``; None where nothing is copied.
    """

    version: int | None
    keeps_params: bool
    last_transfer: Report | None

    @property
    def sleeps(self) -> bool:
        """Whether ``sleep`` gives memory of the trainer's devices back."""
        ...

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
            on_finished: called once for each request, with its place in the list and all of its completions, as soon
                as the last of them has ended. Both are called in the caller's thread; what they raise ends the
                generation and is raised again.
        """
        ...

    def update_weights(self, params: Any, version: int) -> None:
        """Generates from ``params`` (the model's state, as ``nnx.split`` gives it) from now on."""
        ...

    def sleep(self, level: int = 1) -> None:
        """Give back memory: caches (level 1), and weights too (level 2)."""
        ...

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take back what ``sleep`` gave: ``weights``, ``kv_cache``, or both (None)."""
        ...

    def close(self) -> None:
        """End the engine; it cannot be used after."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
