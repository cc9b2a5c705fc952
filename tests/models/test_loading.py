"""Weights on their way to the devices: which bytes are read, how many are held, and what becomes of failures."""

import functools
import os
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrft import models
from jaxrft.config import ConfigError
from jaxrft.models import loading, read_ahead
from jaxrft.models.checkpoint import named_tensors
from jaxrft.models.weight_files import WeightFiles
from tests.models.configs import SHAPE

FIELDS = {**SHAPE, "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory):
    """A folder by the type of its files."""

    @functools.cache
    def make(dtype):
        folder = tmp_path_factory.mktemp(dtype)
        models.save(models.from_config(FIELDS, seed=1), folder, dtype=dtype, shard_bytes=100_000)
        return folder

    return make


@pytest.fixture
def folder(made_folder):
    return made_folder("bfloat16")


def stored(folder):
    """What the files hold, by safetensors itself."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def check(model, folder, dtype="float32"):
    expected = stored(folder)
    found = {tensor.name: array.T if tensor.transposed else array for tensor, array in named_tensors(model)}
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, jnp.asarray(expected[name]).astype(dtype), err_msg=name)


def left_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize(
    ("file_type", "dtype", "block_bytes"),
    [
        ("float32", "float32", 2**24),
        ("float32", "float32", 1000),
        ("float32", "bfloat16", 1),
        ("bfloat16", "bfloat16", 1000),
        ("bfloat16", "float32", 2**24),
        ("float16", "float32", 1000),
    ],
)
def test_blocks_of_any_size(made_folder, monkeypatch, file_type, dtype, block_bytes):
    """Buffers are read into again and again: no parameter is one of them."""
    folder = made_folder(file_type)
    monkeypatch.setattr(loading, "BLOCK_BYTES", block_bytes)
    model = models.load(folder, param_dtype=dtype)
    check(model, folder, dtype)
    assert not any(leaf.committed for leaf in jax.tree.leaves(nnx.state(model)))
    assert not left_threads()


def test_what_is_held_is_bounded(folder, monkeypatch):
    """By the arrays that numpy allocates, at every block that is handed to the device."""
    block_bytes, held, reads = 4096, [], []
    monkeypatch.setattr(loading, "BLOCK_BYTES", block_bytes)
    models.load(folder)
    on_devices, preadv = loading._on_devices, os.preadv

    def measured(block, parts):
        domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        held.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces))
        return on_devices(block, parts)

    def counted(file, buffers, start):
        reads.append(preadv(file, buffers, start))
        return reads[-1]

    monkeypatch.setattr(loading, "_on_devices", measured)
    monkeypatch.setattr(os, "preadv", counted)
    tracemalloc.start()
    try:
        models.load(folder)
    finally:
        tracemalloc.stop()
    total = sum(array.nbytes for array in stored(folder).values())
    assert sum(reads) == total
    assert 0 < max(held) <= read_ahead.BUFFERS * (block_bytes + 64) < total / 2


def test_buffers_wait_for_the_device():
    """A buffer is read into again when what was made of it is ready, and results come in order."""
    events, buffers = [], {}

    class Made:
        def __init__(self, request):
            self.request = request

        def block_until_ready(self):
            events.append(("ready", self.request))

    def read(request, buffer):
        waited = [made for kind, made in events if kind == "ready"]
        assert buffers.get(buffer.ctypes.data, -1) in [-1, *waited]
        buffers[buffer.ctypes.data] = request
        buffer[:] = request
        return buffer

    def take(request, value):
        assert (value == request).all()
        events.append(("taken", request))
        return Made(request)

    read_ahead.read_ahead(list(range(100)), 8, read, take)
    assert [request for kind, request in events if kind == "taken"] == list(range(100))
    assert len(buffers) == read_ahead.BUFFERS
    assert {request for kind, request in events if kind == "ready"} == set(range(100))
    read_ahead.read_ahead([], 0, read, take)


def test_failures_end_the_threads(folder, monkeypatch):
    """A disk that fails half-way, a file that has become shorter, Ctrl-C: each is raised, and no thread is left."""
    monkeypatch.setattr(loading, "BLOCK_BYTES", 1000)
    preadv, calls = os.preadv, []

    def failing(error):
        def read(file, buffers, start):
            calls.append(start)
            if len(calls) < 50:
                return preadv(file, buffers, start)
            if error is None:
                return 0
            raise error

        return read

    for error, message in ((OSError(5, "Input/output error"), "Input/output error"), (None, "it ends at byte")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing(error))
            with pytest.raises(ConfigError, match=rf"\.safetensors: cannot be read \(.*{message}.*the file is damaged"):
                models.load(folder)
        # What was in the queue is not read any more.
        assert len(calls) < 50 + read_ahead.BUFFERS
        assert not left_threads()

    def interrupted(block, parts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_on_devices", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.load(folder)
    assert not left_threads()
    check(models.load(folder), folder)


def test_parts_of_a_tensor(tmp_path):
    """Of rows that are not needed whole, only the bytes of the block are read."""
    array = np.arange(6 * 40, dtype=np.float32).reshape(6, 10, 4)
    save_file({"a": array}, tmp_path / FILE)
    with WeightFiles(tmp_path) as files:
        out = np.empty((3, 8), np.float32)
        files.read("a", out.reshape(-1).view(np.uint8), row=2, column=12, columns=8)
    np.testing.assert_array_equal(out, array.reshape(6, 40)[2:5, 12:20])


def test_tied_tensors_are_compared_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrft.models.weight_files.COMPARED_ELEMENTS", 30)
    a = np.arange(70, dtype=np.float32).reshape(7, 10)
    other = a.copy()
    other[6, 9] += 1
    save_file(
        {"a": a, "half": a.astype(np.float16), "b": other, "c": a.T.copy(), "int": a.astype(int)}, tmp_path / FILE
    )
    with WeightFiles(tmp_path) as files:
        assert files.same("a", "a")
        assert files.same("a", "half")
        assert not any(files.same("a", name) for name in ("b", "c", "int", "absent"))


def test_8_devices_read_each_byte_once(folder, run_python):
    """Sharded, replicated and both: the same numbers as on one device; of half of the devices only half is read."""
    run_python(
        f"""
import os
import jax, numpy as np
from flax import nnx
from jaxrft import models, parallel
from jaxrft.models import loading
from jaxrft.models.checkpoint import named_tensors
folder, read, preadv = {str(folder)!r}, [], os.preadv
def counted(*arguments):
    read.append(preadv(*arguments))
    return read[-1]
os.preadv = counted
alone = nnx.state(models.load(folder))
total = sum(read)
for mesh, strategy in (({{"fsdp": 8}}, "fsdp"), ({{"fsdp": 4, "tensor": 2}}, "fsdp"), ({{"tensor": 8}}, "ddp"),
                       ({{"replica": 8}}, "ddp"), ({{"replica": 2, "fsdp": 2, "tensor": 2}}, "hsdp")):
    layout = parallel.Layout(parallel.make_mesh(**mesh), strategy)
    for block_bytes in (2**24, 3000):
        loading.BLOCK_BYTES = block_bytes
        read.clear()
        state = nnx.state(models.load(folder, layout=layout))
        assert sum(read) == total, (mesh, sum(read), total)
        shardings = layout.shardings("params", state)
        for one, leaf, sharding in zip(*map(jax.tree.leaves, (alone, state, shardings)), strict=True):
            assert leaf.committed and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert all(np.array_equal(np.asarray(one)[shard.index], shard.data) for shard in leaf.addressable_shards)

# As a process of four of the eight devices would read: what these hold, once.
expected = {{t.name: np.asarray(a.T if t.transposed else a) for t, a in named_tensors(models.load(folder))}}
source = loading._source
def half(*arguments):
    whole = source(*arguments)
    return whole._replace(places=dict(list(whole.places.items())[:4]))
def checked(block, parts):
    name, columns, matrix = block.source.name, block.source.columns, expected[block.source.name]
    matrix = matrix.reshape(len(matrix), -1)
    for (row, column), part in zip(block.source.places.values(), parts, strict=True):
        wanted = matrix[row + block.start :][: block.rows, column : column + columns]
        assert np.array_equal(wanted, part.astype(np.float32).reshape(wanted.shape)), name
        needed[name, row + block.start, column] = part.nbytes
loading._source, loading._on_devices = half, checked
loading._put = lambda *arguments: (np.zeros(1), None)
for mesh in ({{"fsdp": 8}}, {{"fsdp": 4, "tensor": 2}}):
    needed = {{}}
    read.clear()
    models.load(folder, layout=parallel.Layout(parallel.make_mesh(**mesh), "fsdp"))
    assert sum(read) == sum(needed.values()) < 0.6 * total
""",
        devices=8,
    )
