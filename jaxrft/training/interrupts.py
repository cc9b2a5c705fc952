"""Ctrl-C and SIGTERM: the run ends at the next safe place, saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(RuntimeError):
    """The run was asked to end and has been saved.

    Attributes:
        signal_number: which signal asked.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Interrupts:
    """Holds back SIGINT and SIGTERM within a ``with`` block.

    The first signal is remembered and :meth:`check` raises at the next safe place; a second one ends the run at
    once, as it would have without this class.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread alone; elsewhere whoever owns that thread decides.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self) -> None:
        """Raises :class:`Interrupted` when a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self._received = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: saving and leaving; once more to leave at once\n".encode())
