"""Safetensors files of a checkpoint folder, in one piece or sharded with an index."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrft.config import ConfigError
from jaxrft.models.names import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "BF16", "F16")


class WeightFiles:
    """Tensors of a folder by name, read one at a time.

    Args:
        folder: holds ``model.safetensors``, or an index and its shards.

    Raises:
        ConfigError: there are no such files, one is missing, or one cannot be read.
    """

    def __init__(self, folder: Path):
        self._handles: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._stack = contextlib.ExitStack()
        for path in weight_paths(folder):
            handle = self._open(path)
            self._file_of.update(dict.fromkeys(handle.keys(), path))

    def names(self) -> set[str]:
        """Every tensor that the files hold."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def type(self, name: str) -> str:
        """Type of a tensor as the file spells it, such as ``BF16``."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the file's type."""
        return self._handles[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def _open(self, path: Path) -> Any:
        try:
            self._handles[path] = self._stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path}: cannot be read ({error}); the file is damaged: fetch or export it again"
            ) from error
        return self._handles[path]

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        ConfigError: there are none, the index cannot be read, or a shard is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ConfigError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; takes weights as safetensors")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: cannot be read ({error!r}); fetch or export it again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ConfigError(f"{folder}: {INDEX_FILE} names files that are missing: {', '.join(missing)}")
    return [folder / shard for shard in shards]


def write_weights(folder: Path, tensors: Iterable[tuple[Tensor, jax.Array]], dtype: str, shard_bytes: int) -> None:
    """Writes tensors as one file, or as shards with an index where they exceed ``shard_bytes``.

    Holds one shard in host memory at a time.

    Args:
        folder: existing; weight files of an earlier export are replaced.
        tensors: each parameter in the module's layout, with its name.
        dtype: type in the file.
        shard_bytes: a shard grows to at most this, unless a single tensor is larger.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shards = list(_plan(list(tensors), itemsize, shard_bytes))
    names = [SINGLE_FILE] if len(shards) == 1 else []
    names = names or [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        # Through new arrays: JAX keeps the host's copy of an array as long as the array lives.
        arrays = {tensor.name: np.asarray(_file_layout(array, tensor.transposed, dtype)) for tensor, array in shard}
        _replace(folder / file, partial(save_file, arrays, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(array.size * itemsize for shard in shards for _, array in shard)
        weight_map = {tensor.name: file for file, shard in zip(names, shards) for tensor, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
        names.append(INDEX_FILE)
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE_FILE, folder / INDEX_FILE]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes ``value`` as indented JSON; the file is whole or is not there."""
    _replace(path, lambda beside: beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))


@partial(jax.jit, static_argnums=(1, 2))
def _file_layout(array: jax.Array, transposed: bool, dtype: str) -> jax.Array:
    return (array.T if transposed else array).astype(dtype)


def _plan(tensors: list, itemsize: int, limit: int) -> Iterator[list]:
    shard: list = []
    size = 0
    for tensor in tensors:
        tensor_size = tensor[1].size * itemsize
        if shard and size + tensor_size > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor_size
    if shard:
        yield shard


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and renames, so that a file is whole or is not there."""
    beside = path.with_name(path.name + ".partial")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        # safetensors makes files that only their owner reads.
        os.chmod(beside, mode)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); free space or choose another folder") from error
