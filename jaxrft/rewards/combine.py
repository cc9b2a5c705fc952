"""Several rewards together: called, checked, weighted and summed."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np

from jaxrft.config import ConfigError
from jaxrft.data.records import Prompt
from jaxrft.rewards.calls import BackgroundLoop, RewardCall, RewardPart, Samples, reward_names
from jaxrft.rewards.records import PartScores, RewardError, Scores


class RewardSet:
    """The rewards of a run.

    A reward is called as ``reward(prompts=..., completions=..., completion_ids=..., **columns)`` with those
    of the arguments that it takes, and returns a number, or None for 'does not apply', per sample.
    Coroutine functions run at the same time as each other and as the other rewards.

    Args:
        functions: the rewards, at least one.
        weights: of each reward in the total. None: 1 each.
        on_error: when a reward raises or returns something that is not a finite number for a sample:
            ``stop`` raises :class:`RewardError`, ``none`` counts the sample as None.

    Raises:
        ConfigError: no rewards, something that cannot be called, or another number of weights.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        weights: Sequence[float] | None = None,
        on_error: Literal["stop", "none"] = "stop",
    ) -> None:
        if not functions:
            raise ConfigError("rewards.functions: got none, takes at least one reward")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ConfigError(f"reward_weights: got {len(weights)} weights for {len(functions)} rewards")
        if not all(map(math.isfinite, weights)):
            raise ConfigError(f"reward_weights: got {weights}, takes finite numbers")
        self.names = reward_names(functions)
        self.weights = weights
        self._calls = [RewardCall(function, name) for function, name in zip(functions, self.names)]
        self._stop = on_error == "stop"
        self._loop = BackgroundLoop()

    def check(self, columns: Iterable[str]) -> None:
        """Refuses a dataset that lacks a column which a reward needs, before anything is generated.

        Raises:
            ConfigError: names the reward and the column.
        """
        columns = list(columns)
        for call in self._calls:
            call.check(columns)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> Scores:
        """Rewards of completions.

        Args:
            prompts: the prompt of each sample.
            texts: the text of each sample's completion, without the prompt.
            completion_ids: its tokens.

        Raises:
            RewardError: a reward raised (unless they count as None) or returned another number of values.
            ConfigError: a reward needs a column that the prompts lack.
        """
        part = RewardPart(Samples.of(prompts, texts, completion_ids))
        self.begin_part(part)
        return self.total([self.finish_part(part)])

    def begin_part(self, part: RewardPart) -> None:
        """Calls the rewards for some samples of a rollout, and waits for those that are not async.

        Raises:
            CancelledError: the part was cancelled; no reward is called after that. Else as of :meth:`score`.
        """
        if len(part.samples) == 0:
            return
        part.check_wanted()
        self.check(part.samples.columns)
        for call in self._calls:
            if call.is_async:
                part.running[call.name] = part.keep(self._loop.submit(call(part.samples)))
        # The others while those run.
        self._finish_calls(part, are_async=False)

    def finish_part(self, part: RewardPart) -> PartScores:
        """Waits for the async rewards of a part that was begun; errors as of :meth:`begin_part`."""
        if len(part.samples) == 0:
            return PartScores([], dict.fromkeys(self.names, np.zeros(0, np.float32)), 0)
        self._finish_calls(part, are_async=True)
        return PartScores(
            places=part.samples.places,
            components={name: part.results[name][0] for name in self.names},
            errors=sum(errors for _, errors in part.results.values()),
        )

    def _finish_calls(self, part: RewardPart, are_async: bool) -> None:
        try:
            for call in self._calls:
                if call.is_async == are_async:
                    part.check_wanted()
                    part.results[call.name] = self._finish(call, part)
        except BaseException:
            part.cancel()
            raise

    def total(self, parts: Sequence[PartScores]) -> Scores:
        """The scores of a whole rollout from those of its parts, with the numbers that the rewards kept meanwhile."""
        order = np.argsort([place for part in parts for place in part.places])
        components = {name: np.concatenate([part.components[name] for part in parts])[order] for name in self.names}
        return Scores(
            total=_weighted_sum(list(components.values()), self.weights),
            components=components,
            errors=sum(part.errors for part in parts),
            metrics=self._metrics() if len(order) else {},
        )

    def close(self) -> None:
        """Ends what the rewards keep running."""
        self._loop.close()
        for call in self._calls:
            getattr(call.function, "close", lambda: None)()

    def _metrics(self) -> dict[str, float]:
        found: dict[str, dict[str, float]] = {
            call.name: getattr(call.function, "pop_metrics", dict)() for call in self._calls
        }
        return {f"rewards/{name}/{key}": value for name, metrics in found.items() for key, value in metrics.items()}

    def _finish(self, call: RewardCall, part: RewardPart) -> tuple[np.ndarray, int]:
        """Values of one reward, float32 [samples], and the samples that it failed on."""
        samples, begun = part.samples, part.running.get(call.name)
        try:
            values = call(samples) if begun is None else begun.result()
        except ConfigError:  # nothing that a sample could cause
            raise
        except Exception as error:
            if part.cancelled:
                raise
            values = self._one_by_one(call, part, error)
        return self._read(call, samples, _check_count(call, samples, values))

    def _one_by_one(self, call: RewardCall, part: RewardPart, error: Exception) -> list[Any]:
        """Finds the samples that a reward raises on, after it raised on all of them together."""
        samples = part.samples
        outcomes = iter([error]) if len(samples) == 1 else self._outcomes(call, part)
        values: list[Any] = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception) and self._stop:
                raise RewardError(
                    f"rewards: {call.name} raised {_describe(outcome, call)} on {samples.name(i)}; "
                    "rewards.on_error: none would count it as None"
                ) from outcome
            alone = outcome if isinstance(outcome, Exception) else _check_count(call, samples.one(i), outcome)[0]
            values.append(alone)
        if self._stop:
            raise RewardError(
                f"rewards: {call.name} raised {_describe(error, call)} on {len(samples)} samples together, and on "
                "none of them alone"
            ) from error
        return values

    def _outcomes(self, call: RewardCall, part: RewardPart) -> Iterator[Any]:
        """What a reward returns or raises for each sample alone; async ones at the same time."""
        singles = [part.samples.one(i) for i in range(len(part.samples))]
        begun = [part.keep(self._loop.submit(call(single))) for single in singles] if call.is_async else None
        for i, single in enumerate(singles):
            part.check_wanted()
            try:
                outcome = call(single) if begun is None else begun[i].result()
            except Exception as error:
                outcome = error
            part.check_wanted()  # what was cancelled is no error of a sample
            yield outcome

    def _read(self, call: RewardCall, samples: Samples, values: Sequence[Any]) -> tuple[np.ndarray, int]:
        numbers, errors = np.full(len(values), np.nan, np.float32), 0
        for i, value in enumerate(values):
            if value is None:
                continue
            number = None if isinstance(value, Exception) else _number(value)
            if number is not None:
                numbers[i] = number
            elif self._stop:
                raise RewardError(
                    f"rewards: {call.name} returned {value!r} for {samples.name(i)}; takes a finite number, or None "
                    "where it does not apply"
                )
            else:
                errors += 1
        return numbers, errors


def _number(value: Any) -> float | None:
    """A value as a finite float32, or None."""
    try:
        number = None if isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) <= float(np.finfo(np.float32).max) else None


def _check_count(call: RewardCall, samples: Samples, values: Any) -> Sequence[Any]:
    no_list = isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__")
    if no_list or getattr(values, "ndim", 1) == 0:
        raise RewardError(
            f"rewards: {call.name} returned {type(values).__name__}, takes a list with a number or None per sample"
        )
    if len(values) != len(samples):
        raise RewardError(
            f"rewards: {call.name} returned {len(values)} values for {len(samples)} completions; takes one for each"
        )
    return values


def _describe(error: Exception, call: RewardCall) -> str:
    """The exception and the line that raised it; the last one in the reward's own file where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(getattr(call.function, "func", call.function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    message = " ".join(str(error).split())[:300]
    place = os.path.relpath(frame.filename)
    place = frame.filename if place.startswith("..") else place
    return f"{type(error).__name__}{f': {message}' if message else ''} ({place}:{frame.lineno})"


def _weighted_sum(components: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    values = np.stack(components).astype(np.float64)
    applies = np.isfinite(values)
    total = np.where(applies, values * np.asarray(weights)[:, None], 0.0).sum(0)
    return np.where(applies.any(0), total, np.nan).astype(np.float32)
