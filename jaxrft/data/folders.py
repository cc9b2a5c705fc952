"""Folders and hub names become rows: datasets that have splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.data.files import SUFFIXES, Rows, read_files
from jaxrft.data.functions import first_line

# Names that files and folders of a split go by.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def read_folder(folder: Path, split: str, name: str) -> Rows:
    """The rows of one split of a folder.

    A folder that ``save_to_disk`` wrote, or one with a dataset card that describes its files, is read
    by ``datasets``. Else the split of each data file is what its name or a folder's says, as in
    ``train.jsonl`` or ``data/test-00000-of-00002.parquet``; files that say nothing are ``train``. Any
    other split is the file of that name.

    Args:
        folder: where to look; sub-folders too.
        split: the split to take.
        name: config field that the folder comes from, for errors.

    Raises:
        ConfigError: no data, or no such split.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, split, name)
    if _has_card(folder):
        return _load(str(folder), None, split, f"{name}: {folder}")
    found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    files = [p for p in found if _is_data(p.relative_to(folder))]
    if not files:
        raise ConfigError(f"{name}: the folder {folder} holds no {', '.join(SUFFIXES)} file and no saved dataset")
    if named := [path for path in files if path.stem == split]:
        return read_files(named, name)
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_of(path.relative_to(folder)) or "train", []).append(path)
    return read_files(_pick(splits, split, f"{name}: {folder}"), name)


def split_of(path: Path) -> str | None:
    """The split that a file's name says, or the nearest folder's that says one."""
    for part in [path.name.removesuffix(path.suffix), *reversed(path.parts[:-1])]:
        said = [SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_NAMES]
        if said:
            return said[-1]
    return None


def read_hub(source: str, split: str, name: str) -> Rows:
    """The rows of one split of ``org/name`` or ``org/name:subset`` on the hub.

    Raises:
        ConfigError: ``datasets`` could not load it.
    """
    path, _, subset = source.partition(":")
    return _load(path, subset or None, split, f"{name}: no file or folder {path!r} here, and as a hub name")


def _load(path: str, subset: str | None, split: str, where: str) -> Rows:
    import datasets

    try:
        return datasets.load_dataset(path, subset, split=split)
    except Exception as error:
        raise ConfigError(f"{where}: {type(error).__name__}: {first_line(error)}") from error


def _read_saved(folder: Path, split: str, name: str) -> Rows:
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ConfigError(f"{name}: the saved dataset {folder} cannot be read: {first_line(error)}") from error
    return _pick(saved, split, f"{name}: {folder}") if isinstance(saved, Mapping) else saved


def _is_data(path: Path) -> bool:
    about = path.name in ("dataset_info.json", "dataset_infos.json")
    return not about and not any(part.startswith((".", "_")) for part in path.parts)


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and re.match(r"---\n(?:.*\n)*?configs:", card.read_text(encoding="utf-8")) is not None


def _pick(splits: Mapping[str, Any], split: str, where: str) -> Any:
    if split not in splits:
        raise ConfigError(
            f"{where}: no split {split!r}, it has {', '.join(splits)}; set data.train_split or data.eval_split"
        )
    return splits[split]
