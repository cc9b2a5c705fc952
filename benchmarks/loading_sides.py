"""What benchmarks/loading.py compares: a checkpoint is made, read plainly, and loaded by us and by transformers."""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch_device import torch_device

BLOCK_BYTES = 2**24


def prepare(virtual_devices: int | None) -> None:
    """Settings of a process of its own: no compiled program comes from an earlier run."""
    from jaxrft.config import ParallelConfig, environment

    environment.apply(ParallelConfig(virtual_devices=virtual_devices, compilation_cache=None))


def make_checkpoint(folder: Path, size: int, dtype: str) -> dict[str, Any]:
    """Random weights of about ``size`` bytes; returns what there is."""
    import ml_dtypes  # noqa: F401
    import numpy as np
    from safetensors.numpy import save_file

    fields = fields_of(size, np.dtype(dtype).itemsize)
    shapes = tensor_shapes(fields)
    total = sum(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize
    # As exports are: several files, none above 4 GiB.
    limit = min(2**32, -(-total // 3))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(math.prod, shards[-1].values())) * np.dtype(dtype).itemsize >= limit:
            shards.append({})
        shards[-1][name] = shape
    numbers = (np.random.default_rng(0).normal(size=2**20) * 0.02).astype(dtype)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: np.resize(numbers, shape) for name, shape in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index_fields = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_fields))
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["Qwen2ForCausalLM"]}))
    return {"bytes": total, "tensors": len(shapes), "files": len(shards), "dtype": dtype, "config": fields}


def fields_of(size: int, itemsize: int) -> dict[str, Any]:
    """Of the largest shape that is not larger, with as many layers as come to the size."""
    import step_shapes

    def bytes_of(fields: dict[str, Any], layers: int) -> int:
        return itemsize * sum(map(math.prod, tensor_shapes({**fields, "num_hidden_layers": layers}).values()))

    found: dict[str, Any] = {}
    for shape in step_shapes.SHAPES:
        fields = step_shapes.hf_config(shape, 1024)
        one, two = bytes_of(fields, 1), bytes_of(fields, 2)
        if not found or one + (fields["num_hidden_layers"] - 1) * (two - one) <= 1.1 * size:
            found = {**fields, "num_hidden_layers": max(1, 1 + round((size - one) / (two - one)))}
    return found


def tensor_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the files, by name."""
    from flax import nnx

    from jaxrft import models
    from jaxrft.models.abstract import abstract_decoder
    from jaxrft.models.checkpoint import tensor_table

    model = abstract_decoder(models.spec_from_config(fields))
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    table = tensor_table(model)
    return {t.name: values[path].shape[:: -1 if t.transposed else 1] for path, t in table.items()}


def page_cache(folder: Path, warm: bool) -> None:
    """Brings the files into the page cache, or out of it."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            if warm:
                _read(file, 0, os.fstat(file).st_size)
            else:
                # Pages that are not on the disk yet would stay.
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read_raw(folder: Path, threads: int) -> dict[str, Any]:
    """A plain read of all files, block by block, into the same few blocks of memory."""
    return _timed_blocks(folder, threads, _read)


def read_kept(folder: Path, threads: int, ratio: float) -> dict[str, Any]:
    """A plain read into fresh memory that stays, as parameters take it where the host is the device.

    Args:
        ratio: bytes of that memory, all of them written, over those of the files.
    """
    return _timed_blocks(folder, threads, partial(_keep, ratio=ratio))


def _timed_blocks(folder: Path, threads: int, read: Callable[[int, int, int], Any]) -> dict[str, Any]:
    files = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))]
    try:
        places = [(file, start) for file in files for start in range(0, os.fstat(file).st_size, BLOCK_BYTES)]
        start, faults = time.perf_counter(), _fresh_bytes()
        with ThreadPoolExecutor(threads) as pool:
            # What they return lives until the last has ended.
            _ = [block.result() for block in [pool.submit(read, *place, BLOCK_BYTES) for place in places]]
            return {"seconds": time.perf_counter() - start, "fresh_bytes": _fresh_bytes() - faults}
    finally:
        for file in files:
            os.close(file)


def _keep(file: int, start: int, size: int, ratio: float) -> mmap.mmap:
    """Reads a block into pages of its own."""
    import numpy as np

    size = min(size, os.fstat(file).st_size - start)
    memory = mmap.mmap(-1, max(1, int(size * ratio)))
    kept = np.frombuffer(memory, np.uint8)
    for read in range(0, size, len(kept)):
        _read_into(kept[: size - read].data, file, start + read)
    # Of parameters that are wider than the files.
    kept[size:] = 0
    return memory


def _read(file: int, start: int, size: int) -> None:
    buffer = memoryview(bytearray(min(size, BLOCK_BYTES)))
    end = start + size
    while start < end and (count := _read_into(buffer[: end - start], file, start)):
        start += count


def _read_into(view: memoryview, file: int, start: int) -> int:
    """Bytes read: all that there are, or as many as fit."""
    done = 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], start + done)):
        done += count
    return done


def load_ours(folder: Path, param_dtype: str, fsdp: int) -> dict[str, Any]:
    import jax
    from flax import nnx

    from jaxrft import models, parallel

    layout = parallel.Layout(parallel.make_mesh(fsdp=fsdp), "fsdp") if fsdp > 1 else None
    before = _reset_peak()
    start, faults = time.perf_counter(), _fresh_bytes()
    arrays = jax.block_until_ready(
        jax.tree.leaves(nnx.state(models.load(folder, dtype=param_dtype, param_dtype=param_dtype, layout=layout)))
    )
    seconds = time.perf_counter() - start
    on_host = jax.default_backend() == "cpu"
    final = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards) if on_host else 0
    return _loaded(seconds, before, final, faults)


def load_theirs(folder: Path, param_dtype: str, platform: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    device = torch_device(platform)
    before = _reset_peak()
    start, faults = time.perf_counter(), _fresh_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, param_dtype)).to(device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    final = sum(p.nbytes for p in model.parameters()) if device == "cpu" else 0
    return _loaded(seconds, before, final, faults)


def _loaded(seconds: float, before: int, final: int, faults: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "fresh_bytes": _fresh_bytes() - faults,
        "final_bytes": final,
        "above_final_bytes": _status("VmHWM") - before - final,
    }


def _fresh_bytes() -> int:
    """Memory that this process has been handed in single pages: more than it holds, where pages came and went."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def _reset_peak() -> int:
    """Makes the peak of the resident memory what it is now, and returns that."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
