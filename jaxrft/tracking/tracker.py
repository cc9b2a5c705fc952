"""One place that a trainer reports to; it fans out to the loggers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxrft.config import TrackingConfig
from jaxrft.tracking.completions import CompletionFiles
from jaxrft.tracking.console import Console
from jaxrft.tracking.loggers import JsonLines, Logger, Metrics


class Tracker:
    """Reports a run to the console, ``metrics.jsonl``, ``completions/`` and the loggers of ``report_to``.

    Args:
        folder: the run's folder; made where it is missing.
        run_name: name shown by loggers.
        report_to: further loggers: ``wandb``, ``tensorboard``.
        tracking: their options.
        config: the resolved config, as loggers show it.
        total_steps: optimizer steps of the whole run.
        resumed_step: None for a new run (files of an older one are set aside, not overwritten); else the last step
            of the checkpoint that the run continues from: what was logged of later steps is cut off.
        console: the console to report to; None makes one.

    Raises:
        ConfigError: a logger of ``report_to`` is not installed or cannot start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_name: str,
        report_to: Sequence[str],
        tracking: TrackingConfig,
        config: dict[str, Any],
        total_steps: int,
        resumed_step: int | None = None,
        console: Console | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.console = console or Console(tracking.progress)
        self._total_steps = total_steps
        self._status: str | None = None
        # Those that can refuse come first, so that a refusal leaves the files of the run as they are.
        self._remote: list[Logger] = _remote_loggers(folder, run_name, report_to, tracking, config, resumed_step)
        self._json_lines = JsonLines(folder / "metrics.jsonl", resumed_step)
        self._completions = CompletionFiles(folder, resumed_step)
        self._messages = (folder / "messages.txt").open("a", encoding="utf-8", errors="backslashreplace")

    def log(self, step: int, metrics: Metrics) -> None:
        """Reports one record and prints its line.

        Args:
            step: optimizer steps done.
            metrics: name -> number. A record of a stage before RL has the stage's name under ``stage`` and its steps
                at most under ``steps``; ``step`` then counts the steps of that stage.
        """
        self._json_lines.log(step, metrics)
        for logger in list(self._remote):
            try:
                logger.log(step, metrics)
            except Exception as error:
                # A run of hours does not end because a server is away; metrics.jsonl has it all.
                self._remote.remove(logger)
                self.console.warn(f"{logger.name} stopped logging at step {step} ({error}); metrics.jsonl goes on")
        self.console.step_line(step, self._total_steps, metrics)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows of one rollout to ``completions/step_<step>.jsonl``."""
        self._completions.write(step, rows)

    def message(self, text: str) -> None:
        """Prints a text and keeps it, with its time, in ``messages.txt``."""
        self.console.print(text)
        self._messages.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._messages.flush()

    @property
    def where(self) -> dict[str, str]:
        """What the run writes -> where a person finds it."""
        loggers: list[Logger] = [self._json_lines, *self._remote]
        return {logger.name: logger.where for logger in loggers} | {"completions": str(self._completions.folder)}

    def close(self, status: str) -> None:
        """Closes all loggers with ``completed``, ``interrupted`` or ``failed``; later calls do nothing."""
        if self._status is not None:
            return
        self._status = status
        for logger in (self._json_lines, *self._remote):
            try:
                logger.close(status)
            except Exception as error:
                self.console.warn(f"{logger.name} did not close properly ({error})")
        self._messages.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} run {status}\n")
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("completed")
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt | SystemExit) else "failed")


def _remote_loggers(
    folder: Path,
    run_name: str,
    report_to: Sequence[str],
    tracking: TrackingConfig,
    config: dict[str, Any],
    resumed_step: int | None,
) -> list[Logger]:
    loggers: list[Logger] = []
    if "tensorboard" in report_to:
        from jaxrft.tracking.tensorboard import TensorBoard

        loggers.append(TensorBoard(folder, resumed_step=resumed_step))
    if "wandb" in report_to and tracking.wandb_mode != "disabled":
        from jaxrft.tracking.wandb import WandB

        loggers.append(WandB(folder, run_name=run_name, tracking=tracking, config=config, resumed_step=resumed_step))
    return loggers
