"""A time budget for each phase of a step, so that a run which hangs ends and says where."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from jaxrft.config import WatchdogConfig

EXIT_CODE = 75
"""Exit status of a process whose phase could not be ended otherwise (EX_TEMPFAIL: trying again may help)."""

# A signal that no launcher or library sends; macOS has no real-time signals.
_SIGNAL = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
_RESEND = 0.5
_LAST_RESORT = 5.0


class PhaseTimeout(BaseException):
    """A phase took longer than its budget.

    Not an ``Exception``: it comes up in the middle of other people's code (rewards), whose ``except Exception``
    must not keep it.

    Attributes:
        phase: the phase.
        budget: its seconds.
        report: file with the stacks of all threads.
    """

    def __init__(self, phase: str, budget: float, report: Path) -> None:
        super().__init__(
            f"{phase} took longer than its budget of {budget:g} s; {report} has what every thread was doing. "
            f"If the phase is only slow, raise watchdog.{phase} (null: no limit)"
        )
        self.phase, self.budget, self.report = phase, budget, report


class Watchdog:
    """Ends a phase that takes longer than its budget.

    It writes the stacks of all threads to ``watchdog.txt``, says so on standard error, and raises
    :class:`PhaseTimeout` in the main thread. Where that has no effect within ``grace`` seconds (the main thread is
    stuck in C, or the phase runs in another thread), the process ends with status 75. A call that also holds
    Python's lock, which no Python thread can get past, is ended by faulthandler 5 s later, with status 1.

    Args:
        budgets: seconds of each phase.
        folder: of the run, for ``watchdog.txt``.
        grace: seconds that a phase has to end after its time-out.
    """

    def __init__(self, budgets: WatchdogConfig, folder: Path, *, grace: float = 10.0) -> None:
        self._budgets: dict[str, float | None] = {f.name: getattr(budgets, f.name) for f in dataclasses.fields(budgets)}
        self.report = Path(folder) / "watchdog.txt"
        self.grace = grace
        self.lock = threading.Lock()
        self._open: list[_Watched] = []

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Watches what is inside the ``with`` block. Phases may nest; the first to run out of time counts.

        Raises:
            ValueError: there is no budget of this name.
            PhaseTimeout: within the block, or at its end where it could not be raised earlier.
        """
        if name not in self._budgets:
            raise ValueError(f"phase {name!r} has no budget; takes one of {', '.join(self._budgets)}")
        budget = self._budgets[name]
        return contextlib.nullcontext() if budget is None else _Watched(self, name, budget)

    def add(self, watched: _Watched) -> None:
        """Takes a phase that begins."""
        with self.lock:
            if watched.in_main:
                # Stays for good: a signal on its way while the default came back would end the process.
                signal.signal(_SIGNAL, self._on_signal)
            self._open.append(watched)
            self._set_last_resort()

    def remove(self, watched: _Watched) -> None:
        """Takes a phase out that ends."""
        with self.lock:
            self._open.remove(watched)
            self._set_last_resort()

    def _set_last_resort(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._open:
            left = min(watched.deadline for watched in self._open) + self.grace + _LAST_RESORT - time.monotonic()
            # Standard error may have no file descriptor (notebooks): then there is no last resort.
            with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):
                descriptor = sys.__stderr__.fileno()  # type: ignore[union-attr]
                faulthandler.dump_traceback_later(max(left, 0.1), exit=True, file=descriptor)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Code of this file must run to its end; it raises by itself, or the signal comes again.
        inside: FrameType | None = frame
        while inside is not None:
            if inside.f_code.co_filename == __file__:
                return
            inside = inside.f_back
        for watched in self._open:
            if watched.in_main and watched.expired and not watched.raised:
                watched.raised = True
                raise PhaseTimeout(watched.name, watched.budget, self.report)


class _Watched:
    """One phase being watched, by a thread of its own that ends with it."""

    def __init__(self, watchdog: Watchdog, name: str, budget: float) -> None:
        self._watchdog, self.name, self.budget = watchdog, name, budget
        self.expired = self.raised = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watchdog of {name}", daemon=True)

    def __enter__(self) -> None:
        self.in_main = threading.current_thread() is threading.main_thread()
        self.deadline = time.monotonic() + self.budget
        self._watchdog.add(self)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._watchdog.lock:
            self._ended.set()
        self._watchdog.remove(self)
        self._thread.join()
        if self.expired and not self.raised and kind is None:
            self.raised = True
            raise PhaseTimeout(self.name, self.budget, self._watchdog.report)

    def _watch(self) -> None:
        if self._ended.wait(self.budget):
            return
        with self._watchdog.lock:
            if self._ended.is_set():
                return
            self.expired = True
        self._report()
        give_up = time.monotonic() + self._watchdog.grace
        while time.monotonic() < give_up:
            with self._watchdog.lock:
                if self.in_main and not self.raised and not self._ended.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
            if self._ended.wait(min(_RESEND, max(give_up - time.monotonic(), 0.0))):
                return
        late = f"{self._watchdog.grace:g} s after its time-out"
        _say(f"{self.name} has not ended {late}: ending the process", show_cursor=True)
        os._exit(EXIT_CODE)

    def _report(self) -> None:
        timeout = PhaseTimeout(self.name, self.budget, self._watchdog.report)
        try:
            self._watchdog.report.parent.mkdir(parents=True, exist_ok=True)
            with self._watchdog.report.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}: over its budget of {self.budget:g} s\n")
                file.writelines(f"thread 0x{t.ident or 0:016x} is {t.name}\n" for t in threading.enumerate())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            _say(f"{self._watchdog.report} could not be written ({error}); the stacks of all threads:")
            with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):
                faulthandler.dump_traceback(sys.__stderr__.fileno(), all_threads=True)  # type: ignore[union-attr]
        _say(str(timeout))


def _say(text: str, show_cursor: bool = False) -> None:
    """Writes to standard error past Python's buffers and locks, which the stuck thread may hold."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        descriptor = sys.__stderr__.fileno()  # type: ignore[union-attr]
        # A progress bar hides the cursor, and is not there to show it again.
        cursor = "\x1b[?25h" if show_cursor and os.isatty(descriptor) else ""
        os.write(descriptor, f"\n{cursor}watchdog: {text}\n".encode(errors="backslashreplace"))
