"""Safetensors files of a checkpoint folder, in one piece or sharded with an index."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrft.config import ConfigError
from jaxrft.models.names import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPARED_ELEMENTS = 2**22
FLOAT_TYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}


class Stored(NamedTuple):
    """Where a tensor lies: in which file, of what type and shape, from which byte on."""

    path: Path
    type: str
    shape: tuple[int, ...]
    start: int


class WeightFiles:
    """Tensors of a folder by name; any part of one can be read, by several threads at once.

    Args:
        folder: holds ``model.safetensors``, or an index and its shards.

    Raises:
        ConfigError: there are no such files, one is missing, or one cannot be read.
    """

    def __init__(self, folder: Path):
        self._stored: dict[str, Stored] = {}
        self._files: dict[Path, int] = {}
        with contextlib.ExitStack() as stack:
            for path in weight_paths(folder):
                with _damages(path):
                    # Checks the header, and that the file is as long as it says.
                    with safe_open(path, framework="numpy"):
                        file = stack.enter_context(path.open("rb", buffering=0))
                    self._stored |= _header(path, file)
                self._files[path] = file.fileno()
            self._stack = stack.pop_all()

    def names(self) -> set[str]:
        """Every tensor that the files hold."""
        return set(self._stored)

    def stored(self, name: str) -> Stored:
        """Where a tensor lies."""
        return self._stored[name]

    def read(self, name: str, out: np.ndarray, row: int, column: int, columns: int) -> None:
        """Fills ``out`` with a block of a tensor, taken as a matrix: its first axis by all the others.

        Args:
            out: bytes, of as many rows as they hold; contiguous.
            row, column: where the block begins.
            columns: its width in elements. Of narrower blocks than the tensor only their own bytes are read.

        Raises:
            ConfigError: the file cannot be read there.
        """
        path, kind, shape, start = self._stored[name]
        size, width = FLOAT_TYPES[kind].itemsize, math.prod(shape[1:])
        start += (row * width + column) * size
        view = out.data
        piece = len(view) if columns == width else columns * size
        with _damages(path):
            for index, place in enumerate(range(0, len(view), piece)):
                _read_fully(self._files[path], view[place : place + piece], start + index * width * size)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are there and hold the same numbers."""
        if not self.names() >= {one, other} or self._stored[one].shape != self._stored[other].shape:
            return False
        shape, types = self._stored[one].shape, {name: self._stored[name].type for name in (one, other)}
        if not set(types.values()) <= set(FLOAT_TYPES):
            return False
        width = math.prod(shape[1:])

        def block(name: str, row: int, rows: int) -> np.ndarray:
            found = np.empty((rows, width), FLOAT_TYPES[types[name]])
            self.read(name, found.reshape(-1).view(np.uint8), row, 0, width)
            return found

        rows = max(1, COMPARED_ELEMENTS // width)
        cuts = [(row, min(rows, shape[0] - row)) for row in range(0, shape[0], rows)]
        return all(np.array_equal(block(one, *cut), block(other, *cut)) for cut in cuts)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


@contextlib.contextmanager
def _damages(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); the file is damaged: fetch or export it again") from error


def _header(path: Path, file: BinaryIO) -> dict[str, Stored]:
    """Of a file that was found in order: its header's length in 8 bytes, the header, and the tensors' bytes."""
    length = int.from_bytes(file.read(8), "little")
    fields = json.loads(os.pread(file.fileno(), length, 8))
    fields.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in fields.items()
    }


def _read_fully(file: int, view: memoryview, start: int) -> None:
    """Reads rather than maps: pages of a mapped file would count as this process's memory."""
    while view:
        count = os.preadv(file, [view], start)
        if not count:
            raise OSError(f"it ends at byte {start}")
        view, start = view[count:], start + count


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
