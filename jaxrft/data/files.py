"""Data files on this machine become rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.data.functions import first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Rows = Sequence[dict[str, Any]]


def read_files(paths: Sequence[Path], name: str) -> Rows:
    """The rows of files of one kind, one file after the other.

    Args:
        paths: ``.json`` and ``.jsonl``, or ``.parquet``, or ``.csv`` files.
        name: config field they come from, for errors.

    Raises:
        ConfigError: another suffix, several kinds, or a file that cannot be read; names the file, and
            of JSON the line.
    """
    suffixes = {path.suffix for path in paths}
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{name}: {path} has the suffix {path.suffix!r}, takes {', '.join(SUFFIXES)}")
    if suffixes <= {".json", ".jsonl"}:
        return [row for path in paths for row in _read_json(path, f"{name}: {path}")]
    if len(suffixes) > 1:
        raise ConfigError(f"{name}: {paths[0].parent} mixes {', '.join(sorted(suffixes))} files; keep one kind")
    return _read_tables(paths, suffixes.pop().removeprefix("."), name)


def _read_tables(paths: Sequence[Path], kind: str, name: str) -> Rows:
    import datasets
    from datasets.utils import are_progress_bars_disabled

    # Empty fields alone are None: "NA", "None" or "nan" may well be answers.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    bars = not are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train", **options)
    except Exception as error:
        places = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
        raise ConfigError(f"{name}: {places} cannot be read: {first_line(error.__cause__ or error)}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _read_json(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = [(f"item {i}", row) for i, row in enumerate(_parse(text, where, 1))]
    else:
        # Not splitlines: JSON text may hold other line separators, such as U+2028, as they are.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(f"line {i}", _parse(line, where, i)) for i, line in lines]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where}, {place}: got {type(row).__name__}, takes an object of columns")
    return [row for _, row in rows]


def _parse(text: str, where: str, first: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}, line {first + error.lineno - 1}: {error.msg} (column {error.colno}); "
            "takes one JSON object a line, or in a .json file a list of objects"
        ) from error
