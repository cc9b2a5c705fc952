"""Where a checkpoint lies: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxrft.config import ConfigError
from jaxrft.models.weight_files import weight_paths

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-][\w.-]*")
FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


def checkpoint_folder(path_or_hub_name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, fetched from the hub where it is neither a folder nor in the local cache.

    Raises:
        ConfigError: there is no such folder and no such model.
    """
    folder = Path(path_or_hub_name).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_hub_name)
    if folder.exists():
        raise ConfigError(f"{name}: is a file; takes the folder that holds config.json and the weights")
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"{name}: no such folder")
    return _cached(name) or _fetched(name)


def _cached(name: str) -> Path | None:
    """The model in the local cache, if it is there with all its files: the tokenizer may have come alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        weight_paths(folder)
    except (LocalEntryNotFoundError, ConfigError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # no network, no such name, no permission: each library version has its own types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name}: is neither a folder here nor a model that can be fetched from the Hugging Face hub ({reason})"
        ) from error
