"""Datasets: files, folders, hub names and functions become rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.data.files import SUFFIXES, Rows, read_files
from jaxrft.data.folders import read_folder, read_hub
from jaxrft.data.functions import check_arguments, load_function, names_function


def load_rows(
    source: Any, *, split: str, arguments: Mapping[str, Any] | None = None, limit: int | None = None, name: str = "data"
) -> Rows:
    """The rows of a dataset.

    JSON rows stay as they are written. Parquet and CSV files, saved datasets and hub names are read by
    ``datasets``; in a CSV file, columns of numbers become numbers and only an empty field is None.

    Args:
        source: a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file; a folder of them, or one that
            ``save_to_disk`` wrote; a hub name ``org/name`` or ``org/name:subset``; a function that
            returns rows, as ``package.module:function`` or ``file.py:function``; or rows: a list of
            dicts or a ``datasets.Dataset``.
        split: the split to take of a folder or hub name.
        arguments: keyword arguments where ``source`` is a function.
        limit: only the first rows.
        name: the config field that ``source`` comes from, for errors.

    Returns:
        a list of dicts, or a ``datasets.Dataset``.

    Raises:
        ConfigError: nothing is there, it cannot be read, or it has no rows.
    """
    rows = _find(source, split, arguments or {}, name) if isinstance(source, str | Path) else source
    _check_rows(rows, f"{name}: {source}" if isinstance(source, str | Path) else name)
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(range(limit)) if hasattr(rows, "select") else rows[:limit]


def _find(source: str | Path, split: str, arguments: Mapping[str, Any], name: str) -> Any:
    text, path = str(source), Path(source).expanduser()
    if path.is_file():
        return read_files([path], name)
    if path.is_dir():
        return read_folder(path, split, name)
    if names_function(text):
        function = load_function(text, name)
        check_arguments(function, arguments, f"{name}: {text}")
        return function(**arguments)
    if path.suffix in SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ConfigError(f"{name}: no file or folder {path.absolute()}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", text):
        return read_hub(text, split, name)
    raise ConfigError(
        f"{name}: got {text!r}, which is no file or folder here; takes a {', '.join(SUFFIXES)} file, a folder, "
        "a hub name org/name or org/name:subset, package.module:function or file.py:function"
    )


def _check_rows(rows: Any, where: str) -> None:
    if isinstance(rows, Mapping):  # a datasets.DatasetDict, most often
        raise ConfigError(f"{where}: got several splits ({', '.join(map(str, rows))}); pass one of them")
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, str):
        raise ConfigError(f"{where}: got {type(rows).__name__}, takes a list of rows or a datasets.Dataset")
    if len(rows) == 0:
        raise ConfigError(f"{where}: the dataset is empty")
    if not isinstance(rows[0], Mapping):
        raise ConfigError(f"{where}: a row is {type(rows[0]).__name__}, takes a dict of columns")
