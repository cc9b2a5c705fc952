"""Results that are kept, of functions that several threads call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

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
        key = args, tuple(sorted(kwargs.items()))
        with self._lock:
            found = self._results.get(key)
            result = self._results.setdefault(key, Future()) if found is None else found
        if found is None:
            self._make(key, result, args, kwargs)
        return result.result()

    def _make(self, key: Hashable, result: Future[R], args: Any, kwargs: Any) -> None:
        try:
            result.set_result(self._function(*args, **kwargs))
        except BaseException as error:
            with self._lock:
                self._results.pop(key, None)
            result.set_exception(error)

    def cache_clear(self) -> None:
        """Forgets all results."""
        with self._lock:
            self._results.clear()
