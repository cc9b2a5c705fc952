"""A phase of a run: shown, timed and watched in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from jaxrft.tracking.console import Console
from jaxrft.tracking.timing import PhaseTimer
from jaxrft.training.watchdog import Watchdog


class Phases:
    """Makes phases.

    Args:
        console: shows a bar for each.
        timer: adds up their seconds.
        watchdog: ends a run whose phase is over its budget; None outside a run.
        check: called at every step of progress; raises to leave the phase.
    """

    def __init__(
        self,
        console: Console,
        timer: PhaseTimer,
        watchdog: Watchdog | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.console, self.timer, self._watchdog, self.check = console, timer, watchdog, check

    @contextlib.contextmanager
    def __call__(
        self, name: str, total: int | None = None, interruptible: bool = True
    ) -> Iterator[Callable[..., None]]:
        """Runs a phase; what it yields takes (done, total). A signal ends a phase that is interruptible."""
        watched = self._watchdog.phase(name) if self._watchdog else contextlib.nullcontext()
        with watched, self.timer.phase(name), self.console.phase(name, total) as bar:

            def progress(done: int, of: int | None = None) -> None:
                bar.update(done, of)
                if interruptible:
                    self.check()

            yield progress
