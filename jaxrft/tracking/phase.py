"""The progress of one phase: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LONG_PHASE = 10.0
LINE_EVERY = 30.0
WIDE = 60


class Bars:
    """The bars on a terminal: shown while any phase is open, gone after."""

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._open = 0
        self._lock = threading.Lock()

    def add(self, description: str, total: int | None) -> tuple[Progress, TaskID]:
        """Adds a bar, and shows it."""
        with self._lock:
            if self._progress is None:
                columns: list[ProgressColumn] = [
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                ]
                if self._console.width >= WIDE:
                    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
                self._progress = Progress(*columns, console=self._console, transient=True)
                self._progress.start()
            self._open += 1
            return self._progress, self._progress.add_task(description, total=total)

    def remove(self, task: TaskID) -> None:
        """Removes a bar, and the display with the last one."""
        with self._lock:
            assert self._progress is not None
            self._progress.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._progress.stop()
                self._progress = None


class BarPhase:
    """A phase with a progress bar."""

    def __init__(self, bars: Bars, name: str, total: int | None) -> None:
        self._bars, self._name, self._total = bars, name, total

    def update(self, done: int, total: int | None = None) -> None:
        """Sets the units done, and their total where it is known only now."""
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress, self._task = self._bars.add(self._name, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.remove(self._task)


class LinePhase:
    """A phase that prints plain lines: every 30 seconds, and at its end where it was long or ``always`` is set."""

    def __init__(self, write: Callable[[str], None], name: str, total: int | None, always: bool) -> None:
        self._write, self._name, self._total, self._always = write, name, total, always
        self._done: int | None = None
        self._start = time.monotonic()
        self._next = self._start + LINE_EVERY

    def update(self, done: int, total: int | None = None) -> None:
        """Sets the units done, and their total where it is known only now."""
        self._done, self._total = done, total or self._total
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY
            self._write(f"{self._state()} after {now - self._start:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if kind is None and (self._always or now - self._start >= LONG_PHASE):
            self._write(f"{self._state()} done in {now - self._start:.1f} s")

    def _state(self) -> str:
        if self._done is None:
            return self._name
        return f"{self._name} {self._done}" + (f"/{self._total}" if self._total else "")
