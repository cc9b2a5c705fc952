"""Metrics between two records, as one."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Counters and totals: the newest value is what they say.
_LATEST = ("epoch", "num_tokens", "learning_rate", "skipped_steps", "peak_memory_bytes")


class MetricWindow:
    """Averages what is added until it is taken; maxima and minima by name, counters by their newest value."""

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self._values = {name: list(values) for name, values in (state or {}).items()}

    def state(self) -> dict[str, list[float]]:
        """What has been added, to go on with after a restart."""
        return {name: list(values) for name, values in self._values.items()}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of one step."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The metrics since the last call."""
        taken = {name: _merge(name, values) for name, values in self._values.items()}
        self._values = {}
        return taken


def _merge(name: str, values: list[float]) -> float:
    if name in _LATEST:
        return values[-1]
    valid = [v for v in values if not math.isnan(v)]
    if not valid:
        return math.nan
    if name.endswith(("max", "max_length")):
        return max(valid)
    if name.endswith(("min", "min_length")):
        return min(valid)
    return sum(valid) / len(valid)
