"""What a run shows on the terminal, or writes to a log where there is none."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from jaxrft.tracking.phase import BarPhase, Bars, LinePhase
from jaxrft.tracking.step_line import step_line
from jaxrft.tracking.text import printable, shorten

CELL_LIMIT = 400
PLAIN_WIDTH = 120
# Times that are part of phases, or ran beside them: the phases alone make up a step.
WITHIN_PHASES = ("time/compile", "time/rewards_overlapped")


class Console:
    """Progress bars, step lines, tables and warnings.

    Where the output is not a terminal (a pipe, a CI log), it gets plain lines: no control characters, no bars.
    All text is taken literally: neither markup nor control characters in it have an effect.

    Args:
        progress: show bars on a terminal.
        file: where to write; None: standard output.
        width: columns; None: the terminal's.
    """

    def __init__(self, progress: bool = True, *, file: TextIO | None = None, width: int | None = None) -> None:
        terminal = (file or sys.stdout).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        if not terminal and width is None and not os.environ.get("COLUMNS"):
            width = PLAIN_WIDTH
        self._rich = RichConsole(
            file=file,
            width=width,
            force_terminal=terminal,
            no_color=None if terminal else True,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._terminal = terminal
        self._bars = Bars(self._rich) if terminal and progress else None
        self._seen_phases: set[str] = set()
        self._warnings: dict[str, int] = {}
        self._position = ""
        self._start: tuple[int, float] | None = None

    @property
    def warnings(self) -> list[str]:
        """The warnings so far, each once."""
        return list(self._warnings)

    def phase(self, name: str, total: int | None = None) -> BarPhase | LinePhase:
        """A part of a step that takes time: ``with console.phase("rollout", 64) as phase: phase.update(8)``.

        Args:
            name: rollout, rewards, training, evaluation, checkpoint or another.
            total: units of work, where known.
        """
        if self._bars is not None:
            return BarPhase(self._bars, self._clean(f"{self._position}{name}"), total)
        first = name not in self._seen_phases
        self._seen_phases.add(name)
        return LinePhase(self.print, self._clean(name), total, always=first)

    def step_line(self, step: int, total_steps: int | None, metrics: Mapping[str, Any]) -> None:
        """Prints one line with what a person needs of a logged step, and when the run will end."""
        remaining = None
        if total_steps and "stage" not in metrics:
            remaining = self._remaining(step, total_steps)
            self._position = f"[{step}/{total_steps}] "
        width = self._rich.width if self._terminal else None
        line = step_line(step, total_steps, metrics, seconds=_seconds(metrics), remaining=remaining, width=width)
        self._print_text(self._clean(line))

    def print(self, *texts: object) -> None:
        """Prints texts, separated by a space; the terminal breaks long lines, so that paths can be copied whole."""
        self._print_text(self._clean(" ".join(map(str, texts))))

    def warn(self, text: str) -> None:
        """Prints a warning the first time; all are kept in :attr:`warnings` for the end of the run."""
        self._warnings[text] = self._warnings.get(text, 0) + 1
        if self._warnings[text] == 1:
            self._print_text(f"warning: {self._clean(text)}", style="yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints a table; where the columns have no room beside each other, each row as a list."""
        cells = [[self._clean(shorten(str(value), CELL_LIMIT)) for value in row] for row in rows]
        self._print_text(self._clean(title), style="bold")
        if self._rich.width < 14 * len(columns):
            for row in cells:
                self._print_text("\n".join(f"  {self._clean(name)}: {cell}" for name, cell in zip(columns, row)) + "\n")
            return
        table = Table(show_lines=True)
        for name in columns:
            table.add_column(Text(self._clean(name)), overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self._rich.print(table)

    def banner(self, title: str, rows: Mapping[str, object] | Sequence[tuple[str, object]]) -> None:
        """Prints facts under a title, one a line."""
        pairs = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
        width = max((len(name) for name, _ in pairs), default=0)
        self._print_text(f"\n{self._clean(title)}", style="bold")
        for name, value in pairs:
            self._print_text(self._wrap(f"  {self._clean(name):<{width}}  ", self._clean(str(value))))
        self._print_text("")

    def _clean(self, text: str) -> str:
        return printable(text, self._rich.encoding)

    def _wrap(self, head: str, text: str) -> str:
        # Words longer than the line stay whole: a path that is broken cannot be copied.
        indent = " " * len(head)
        lines = textwrap.wrap(
            text,
            max(self._rich.width, 2 * len(head)),
            initial_indent=head,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join(lines) or head

    def _print_text(self, text: str, style: str = "") -> None:
        self._rich.print(Text(text, style=style), soft_wrap=True)

    def _remaining(self, step: int, total_steps: int) -> float | None:
        # From the first line on, since the first step compiles.
        now = time.monotonic()
        if self._start is None or step < self._start[0]:
            self._start = (step, now)
        first, start = self._start
        return (now - start) / (step - first) * (total_steps - step) if step > first else None


def _seconds(metrics: Mapping[str, Any]) -> float | None:
    """Seconds of the step: of its phases."""
    phases = [value for name, value in metrics.items() if name.startswith("time/") and name not in WITHIN_PHASES]
    return sum(phases) if phases else None
