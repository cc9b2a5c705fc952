"""Prompts, completions and rewards of every rollout, as files a person can search."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrft.tracking.loggers import set_aside

FOLDER = "completions"
_NAME = re.compile(r"step_(\d+)\.jsonl")


class CompletionFiles:
    """``completions/step_000010.jsonl``: one object a completion, a file a rollout.

    A row has ``step``, ``prompt`` (text or chat messages), ``completion``, ``reward``, ``rewards`` (name ->
    value or None), ``advantage``, ``finish_reason`` and the dataset's other columns. Values that JSON lacks
    (images, arrays) become a short text.

    Args:
        folder: the run's folder.
        resumed_step: None sets older files aside; a number removes those of later steps.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        self.folder = folder / FOLDER
        if resumed_step is None:
            set_aside(self.folder)
        else:
            for step, path in _files(self.folder):
                if step > resumed_step:
                    path.unlink()

    def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes the rows of one rollout and returns the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:06d}.jsonl"
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **_plain(row)}, ensure_ascii=False) + "\n")
        return path


def read_completions(folder: Path | str, step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a run's completions, in order of steps.

    Args:
        folder: the run's folder, or its ``completions`` folder.
        step: only those of this step.

    Raises:
        FileNotFoundError: the folder holds no completions.
    """
    folder = Path(folder)
    files = _files(folder / FOLDER) or _files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no completions; a run writes them when log_completions is true")
    wanted = [path for number, path in files if step is None or number == step]
    rows: list[dict[str, Any]] = []
    for path in wanted:
        # Not str.splitlines: it splits at characters such as U+2028, which JSON strings may hold.
        with path.open(encoding="utf-8", newline="\n") as file:
            rows.extend(json.loads(line) for line in file)
    return rows


def _files(folder: Path) -> list[tuple[int, Path]]:
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.jsonl")]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic) or (hasattr(value, "shape") and value.shape == ()):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "shape"):
        return f"<{type(value).__name__} {tuple(value.shape)}>"
    return str(value) if isinstance(value, os.PathLike | datetime.date | uuid.UUID) else f"<{type(value).__name__}>"
