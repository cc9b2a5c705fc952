"""Where metrics go: the small protocol of loggers, and the one that every run has."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

# A value is a number; the record of a stage other than RL has its name under "stage".
Metrics = Mapping[str, float | str | None]


class Logger(Protocol):
    """What a tracker hands its records to."""

    name: str

    @property
    def where(self) -> str:
        """Where a person finds the records: a path, an address or a command."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step."""

    def close(self, status: str) -> None:
        """Ends with ``completed``, ``interrupted`` or ``failed``. Called once."""


def numbers(metrics: Metrics) -> dict[str, float]:
    """The metrics that are numbers; NaN and infinities are."""
    return {name: float(value) for name, value in metrics.items() if is_number(value)}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value converts to a float without being text; NumPy and JAX scalars do."""
    return value is not None and not isinstance(value, str) and hasattr(value, "__float__")


class JsonLines:
    """``metrics.jsonl``: one object a record, with ``step``, ``time`` (Unix, seconds) and the metrics.

    NaN and infinities are null, since JSON has neither. Each line is flushed.

    Args:
        path: the file.
        resumed_step: None begins the file, setting an older one aside. A number continues it: records of later
            steps are cut off, and so is a line that a crash left incomplete; records with a ``stage`` came before
            the first RL step and stay.
    """

    name = "metrics"

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_step is None:
            set_aside(path)
        elif path.exists():
            _cut(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self.where = str(path)

    def log(self, step: int, metrics: Metrics) -> None:
        """Appends one line."""
        record = {"step": int(step), "time": round(time.time(), 3)}
        record.update({name: _jsonable(value) for name, value in metrics.items()})
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self, status: str) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without a last line that is incomplete (a run may be writing)."""
    return [record for _, record in _records(Path(path))]


def set_aside(path: Path) -> None:
    """Renames a file or folder that is not empty to the first free of ``<name>.old1``, ``<name>.old2``, ..."""
    if not path.exists() or not (any(path.iterdir()) if path.is_dir() else path.stat().st_size):
        return
    number = 1
    while (older := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    path.rename(older)


def _cut(path: Path, last_step: int) -> None:
    kept = [line for line, record in _records(path) if "stage" in record or record["step"] <= last_step]
    replacement = path.with_name(path.name + ".part")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and "step" in record:
                yield line, record


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
