"""Results that are kept, of functions that several threads call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Once(Generic[P, R]):
    """A function whose result is kept; threads that ask for the same one wait for a single call.

    ``functools.cache`` calls the function in each of them. Programs are compiled in several threads at once: a kernel
    would be tried twice, and what was found said twice. An error comes up in all that wait, and is not kept.

    Args:
        function: its arguments are hashable; it does not ask for its own result.
    """

    def __init__(self, function: Callable[P, R]):
        functools.update_wrapper(self, function)
        self._function = function
        self._lock = threading.Lock()
        self._results: dict[Hashable, Future[R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result for these arguments."""
        key, mine = (args, tuple(sorted(kwargs.items()))), Future[R]()
        while True:
            try:
                with self._lock:
                    found = self._results.setdefault(key, mine)
                if found is mine:
                    mine.set_result(self._function(*args, **kwargs))
            except BaseException as error:
                self._drop(key, mine)
                if not mine.done():
                    mine.set_exception(error)
                raise
            try:
                return found.result()
            except BaseException as error:
                theirs = found.done() and found.exception() is error
                # Ctrl-C in the thread that made the call is no result of it.
                if isinstance(error, Exception) or not theirs:
                    raise

    def _drop(self, key: Hashable, mine: Future[R]) -> None:
        with self._lock:
            if self._results.get(key) is mine:
                del self._results[key]

    def cache_clear(self) -> None:
        """Forgets all results."""
        with self._lock:
            self._results.clear()
