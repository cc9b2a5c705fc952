"""How one reward is called: with the arguments that it takes, by name, sync or async."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Self

import numpy as np

from jaxrft.config import ConfigError
from jaxrft.data.prompts import REWARD_ARGUMENTS
from jaxrft.data.records import Prompt
from jaxrft.rewards.rules import Completion


@dataclasses.dataclass(frozen=True)
class Samples:
    """Answers to score.

    Attributes:
        prompts: of each sample, as its dataset row holds it: text or chat messages.
        completions: text, or for chat messages a list with the assistant's message.
        completion_ids: tokens of each completion.
        columns: column -> its value for each sample.
        rows: dataset row of each sample.
        texts: text of each completion.
        places: of each sample in the rollout.
    """

    prompts: list[Any]
    completions: list[Completion]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    rows: list[int]
    texts: list[str]
    places: list[int]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        places: Sequence[int] | None = None,
    ) -> Self:
        """Samples of prompts (one a sample), and the text and tokens of what the model answered."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        return cls(
            prompts=[p.value if isinstance(p.value, str) else [dict(message) for message in p.value] for p in prompts],
            completions=[
                text if isinstance(p.value, str) else [{"role": "assistant", "content": text}]
                for p, text in zip(prompts, texts)
            ],
            completion_ids=[list(ids) for ids in completion_ids],
            columns={name: [p.columns.get(name) for p in prompts] for name in names},
            rows=[p.index for p in prompts],
            texts=list(texts),
            places=list(range(len(prompts)) if places is None else places),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def one(self, i: int) -> Self:
        """The sample ``i`` alone."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "columns"}
        columns = {name: values[i : i + 1] for name, values in self.columns.items()}
        return dataclasses.replace(self, columns=columns, **{name: part[i : i + 1] for name, part in parts.items()})

    def name(self, i: int) -> str:
        """The sample ``i`` in an error."""
        return f"sample {self.places[i]} (row {self.rows[i]} of the dataset), completion {self.texts[i][:200]!r}"


@dataclasses.dataclass
class RewardPart:
    """Samples on their way through the rewards.

    Another thread may cancel them at any time, while their rewards are still being called too.

    Attributes:
        samples: these.
        running: each async reward's answer to come.
        results: of each reward that is done: float32 [samples], and the samples that it failed on.
        cancelled: whether nobody wants them any more.
    """

    samples: Samples
    running: dict[str, concurrent.futures.Future[Any]] = dataclasses.field(default_factory=dict)
    results: dict[str, tuple[np.ndarray, int]] = dataclasses.field(default_factory=dict)
    cancelled: bool = False
    _futures: list[concurrent.futures.Future[Any]] = dataclasses.field(default_factory=list)

    def keep(self, future: concurrent.futures.Future[Any]) -> concurrent.futures.Future[Any]:
        """The same future, which is cancelled with the part; at once where the part is cancelled already."""
        # In this order, and that of `cancel`, none is overlooked: a lock could stay locked where Ctrl-C comes up.
        self._futures.append(future)
        if self.cancelled:
            future.cancel()
        return future

    def cancel(self) -> None:
        """Ends the async rewards at their next ``await``, and calls no further ones."""
        self.cancelled = True
        for future in self._futures:
            future.cancel()

    def check_wanted(self) -> None:
        """Raises where the part is cancelled."""
        if self.cancelled:
            raise concurrent.futures.CancelledError("nobody waits for these rewards any more")


class RewardCall:
    """A reward function and what it takes.

    Attributes:
        function: the reward.
        name: of its metrics.
        is_async: whether calling it gives a coroutine.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rewards: {name!r} is {type(function).__name__}, takes a function") from error
        # Arguments from the config stand before a column of the same name.
        bound = function.keywords if isinstance(function, functools.partial) else {}
        named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in bound]
        self._takes = {p.name for p in named}
        self._needs = [p.name for p in named if p.default is p.empty]
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
        self._bound = set(bound)

    def check(self, columns: Iterable[str]) -> None:
        """Refuses a dataset without a column that the reward needs."""
        columns = list(columns)
        for name in self._needs:
            if name not in columns and name not in REWARD_ARGUMENTS:
                raise ConfigError(
                    f"rewards: {self.name} needs the column {name!r}, the dataset has {', '.join(columns) or 'none'} "
                    f"beside the prompt; set data.columns, as in {{{name}: name in the dataset}}"
                )

    def __call__(self, samples: Samples) -> Any:
        """What the reward returns, a coroutine where it is async. The lists it gets are its own."""
        given = {name: list(getattr(samples, name)) for name in REWARD_ARGUMENTS}
        given |= {name: list(values) for name, values in samples.columns.items()}
        accepted = {n: v for n, v in given.items() if n in self._takes or (self._takes_any and n not in self._bound)}
        return self.function(**accepted)


class BackgroundLoop:
    """An event loop in a thread of its own, which starts at first use.

    A loop of its own works inside a notebook, where one is running already, and stays the same between
    calls, so that a reward may keep its connections.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Runs a coroutine; the future holds what it returns or raises."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_contained(coroutine), self._loop)

    def close(self) -> None:
        """Stops the thread; a later ``submit`` starts another."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        # These would end the loop, and whoever waits for an answer would wait for ever.
        raise RuntimeError(f"raised {error!r}") from error


def reward_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """A different name for each reward: its own, with a number behind where another has it already."""
    names: list[str] = []
    for function in functions:
        own = getattr(function, "__name__", type(function).__name__).strip("<>")
        count = 1
        name = own
        while name in names:
            count += 1
            name = f"{own}_{count}"
        names.append(name)
    return names
