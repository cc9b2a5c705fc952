"""Results that are kept, of functions that several threads call."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Once(Generic[P, R]):
    """A function whose result is kept, and which one thread at a time calls for the same arguments.

    ``functools.cache`` alone calls it in each thread that asks before there is a result. Programs are compiled in
    several threads at once: a kernel would be tried twice, and what was found said twice. An error is not kept.

    Args:
        function: its arguments are hashable; it does not ask for its own result.
    """

    def __init__(self, function: Callable[P, R]):
        functools.update_wrapper(self, function)
        self._kept: Any = functools.cache(function)
        self._guard = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result for these arguments."""
        with self._guard:
            lock = self._locks[args, tuple(sorted(kwargs.items()))]
        with lock:
            return self._kept(*args, **kwargs)

    def cache_clear(self) -> None:
        """Forgets all results."""
        self._kept.cache_clear()
