"""The thread in which rewards are called while the main one generates."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

# So long a call may go on when everything is closed, before it is left to itself.
END_SECONDS = 2.0


class CallThread:
    """One thread, which starts at first use, for calls one after the other.

    So no function is called while a call of it runs, even one left over from a rollout that was given up, and it may
    keep what belongs to a thread from call to call. The thread does not keep the process from ending. ``submit`` and
    ``close`` are for one caller's thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, call: Callable[[], None]) -> None:
        """Has something called that raises nothing; returns at once.

        Raises:
            RuntimeError: the thread was closed; who waits for the call would wait for ever.
        """
        if self._closed:
            raise RuntimeError(f"the thread of {self._name} is closed")
        self._calls.put(call)
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread for good; a call that does not end soon is left to itself."""
        self._closed = True
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join(END_SECONDS)


def _run(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
