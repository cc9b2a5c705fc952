"""What a run reports of its rollouts and updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrft.config import RLConfig
from jaxrft.tracking import Tracker
from jaxrft.training import metrics as measures
from jaxrft.training.drawing import Drawn
from jaxrft.training.window import MetricWindow


class Reporter:
    """Collects metrics until they are due, and keeps what was measured last.

    Args:
        config: of the run.
        tracker: where everything goes.
        total_steps: optimizer steps of the whole run.
        window: metrics since the last record, of the run that is continued.
    """

    def __init__(self, config: RLConfig, tracker: Tracker, total_steps: int, window: dict[str, list[float]] | None):
        self.config, self.tracker, self.total_steps = config, tracker, total_steps
        self.last: dict[str, float] = {}
        self._window = MetricWindow(window)
        # What was measured at the present step, for choosing the best checkpoint.
        self._present: tuple[int, dict[str, float]] = (-1, {})

    def state(self) -> dict[str, list[float]]:
        """The metrics since the last record, to go on with after a restart."""
        return self._window.state()

    def updates(self, last_step: int, shared: dict[str, float], updates: list[dict[str, float]]) -> None:
        """Adds the optimizer steps made on one rollout.

        Args:
            last_step: the number of the last of them.
            shared: what all of them have in common.
            updates: the statistics of each.
        """
        for number, update in enumerate(updates, start=last_step - len(updates) + 1):
            self._window.add(shared | update)
            if number % self.config.logging_steps == 0 or number == self.total_steps:
                self.log(number, self._window.take())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A record of metrics."""
        self.tracker.log(step, metrics)
        self.last |= metrics
        at, known = self._present
        self._present = (step, (known if at == step else {}) | metrics)

    def measured_at(self, step: int) -> dict[str, float]:
        """The finite numbers that were logged at a step, if it is the present one."""
        at, known = self._present
        return {k: v for k, v in known.items() if np.isfinite(v)} if at == step else {}

    def completions(self, step: int, drawn: Drawn, advantages: np.ndarray) -> None:
        """Writes and prints what was generated, as far as the config asks for it.

        Args:
            advantages: of each sample that was generated.
        """
        if not (self.config.log_completions or self.config.num_completions_to_print):
            return
        rows = measures.completion_rows(drawn.rollout, advantages)
        if self.config.log_completions:
            self.tracker.log_completions(step, rows)
        if self.config.num_completions_to_print:
            shown: list[dict[str, Any]] = rows[: self.config.num_completions_to_print]
            self.tracker.console.table(
                f"Completions of step {step}",
                ["prompt", "completion", "reward"],
                [[str(row[name]) for name in ("prompt", "completion", "reward")] for row in shown],
            )
