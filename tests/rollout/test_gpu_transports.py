"""The ways to servers on GPUs: anywhere against libraries that only look like CUDA, on a GPU against CUDA itself."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrft.rollout.server_side import jaxrft_cuda
from jaxrft.rollout.transfer.cuda_ipc import CudaIpc
from jaxrft.rollout.transfer.nccl import NcclBroadcast
from tests.conftest import ROOT
from tests.rollout.fake_gpu import FakeDriver, FakeNccl, FakeRuntime

SERVER_SIDE = ROOT / "jaxrft" / "rollout" / "server_side"
DTYPES = ["float32", "bfloat16"]


def bucket(seed: int, elements: int, dtype: str) -> jax.Array:
    """Random bits as they are in memory, NaNs and all; not made by way of numbers."""
    size = elements * jnp.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return jnp.asarray(data.view(jnp.dtype(dtype)))


@pytest.fixture
def runtime():
    return FakeRuntime()


@pytest.fixture
def cuda(runtime):
    return jaxrft_cuda.Cuda(runtime, FakeDriver())


class Gpu(NamedTuple):
    """A device as far as a transport that puts nothing looks at it."""

    local_hardware_id: int


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_server_sees_every_bucket_in_its_slot(runtime, cuda, dtype):
    transport = CudaIpc(jax.devices()[:1], slot_bytes=1000, cuda=cuda)
    description = json.loads(json.dumps(transport.describe(0)))
    assert (transport.name, transport.slots, transport.put_first) == (description["kind"], 2, True)
    assert description["slot_bytes"] == 1024
    [(uuid, handle)] = description["handles"].items()
    assert uuid == "ab000001-0203-0405-0607-08090a0b0c00"
    opened = cuda.open_handle(bytes.fromhex(handle))
    contents = {0: None, 1: None}
    for seed, (slot, elements) in enumerate([(0, 250), (1, 200), (0, 7), (1, 1)]):
        packed = bucket(seed, elements, dtype)
        transport.put(slot, packed)
        contents[slot] = np.asarray(packed).tobytes()
        for other, content in contents.items():
            assert ctypes.string_at(opened + other * 1024, len(content or b"")) == (content or b"")
    cuda.close_handle(opened)
    assert runtime.opened == []
    transport.close()
    transport.close()
    assert runtime.memory == {}
    assert runtime.log.count("cudaFree") == 1
    with pytest.raises(RuntimeError, match="closed"):
        transport.put(0, bucket(0, 1, dtype))


def test_slabs_do_not_share_a_block_of_cuda_with_other_memory(runtime, cuda):
    CudaIpc([Gpu(3)], slot_bytes=3 << 20, cuda=cuda)
    CudaIpc([Gpu(3)], slot_bytes=1, cuda=cuda)
    assert [(device, len(buffer)) for device, buffer in runtime.memory.values()] == [(3, 6 << 20), (3, 2 << 20)]


def test_one_slab_for_each_gpu(run_python):
    code = """
import ctypes, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrft.rollout.server_side.jaxrft_cuda import Cuda
from jaxrft.rollout.transfer.cuda_ipc import CudaIpc
from tests.rollout.fake_gpu import FakeDriver, FakeRuntime
runtime = FakeRuntime()
cuda = Cuda(runtime, FakeDriver())
first, second = jax.devices()
transport = CudaIpc([second, first, second], 256, cuda=cuda)
assert [device for device, _ in runtime.memory.values()] == [1, 0]
handles = transport.describe(0)["handles"]
assert [uuid[-2:] for uuid in handles] == ["01", "00"]
mesh = jax.make_mesh((2,), ("fsdp",))
data = np.arange(50, dtype=np.float32)
transport.put(1, jax.device_put(data, NamedSharding(mesh, PartitionSpec())))
for handle in handles.values():
    assert ctypes.string_at(cuda.open_handle(bytes.fromhex(handle)) + 256, 200) == data.tobytes()
for wrong in (jax.device_put(data, NamedSharding(mesh, PartitionSpec("fsdp"))), jax.device_put(data, first)):
    try:
        transport.put(0, wrong)
    except ValueError as error:
        print(error)
transport.close()
assert not runtime.memory
"""
    lines = run_python(code, devices=2).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("a bucket must be whole on each device")
    assert "(25,) of (50,)" in lines[0]
    assert lines[1].startswith("a bucket must lie on")


@pytest.mark.parametrize(
    ("slot", "shape", "message"),
    [
        (2, (4,), "slot 2 is not one of 2"),
        (-1, (4,), "slot -1 is not one of 2"),
        (0, (2, 2), r"must be flat, this one has shape \(2, 2\)"),
        (0, (65,), "260 bytes does not fit into a slot of 256"),
    ],
)
def test_what_is_no_bucket_is_refused(runtime, cuda, slot, shape, message):
    transport = CudaIpc(jax.devices()[:1], slot_bytes=256, cuda=cuda)
    with pytest.raises(ValueError, match=message):
        transport.put(slot, jnp.zeros(shape))
    assert "cudaMemcpyAsync" not in runtime.log


@pytest.mark.parametrize("call", ["cudaSetDevice", "cudaMalloc", "cudaIpcGetMemHandle", "cuDeviceGetUuid_v2"])
def test_nothing_leaks_when_the_second_gpu_refuses(runtime, call):
    driver = FakeDriver()
    for library in (runtime, driver):
        library.failing[call] = [0, 2]
    with pytest.raises(RuntimeError, match=f"{call} failed with code 2: the runtime's words for 2"):
        CudaIpc([Gpu(0), Gpu(1)], slot_bytes=256, cuda=jaxrft_cuda.Cuda(runtime, driver))
    assert runtime.memory == {}
    assert runtime.log.count("cudaFree") == runtime.log.count("cudaMalloc") - (call == "cudaMalloc")


def test_every_slab_is_freed_when_one_refuses(runtime, cuda):
    transport = CudaIpc([Gpu(0), Gpu(1)], slot_bytes=256, cuda=cuda)
    runtime.failing["cudaFree"] = [700]
    with pytest.raises(RuntimeError, match="cudaFree failed with code 700"):
        transport.close()
    assert len(runtime.memory) == 1
    assert runtime.log.count("cudaFree") == 2
    transport.close()
    assert runtime.log.count("cudaFree") == 2


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failed_put_says_which_call_and_leaves_no_error_behind(runtime, cuda, call):
    transport = CudaIpc(jax.devices()[:1], slot_bytes=256, cuda=cuda)
    runtime.failing[call] = [719]
    with pytest.raises(RuntimeError, match=f"{call} failed with code 719: the runtime's words for 719"):
        transport.put(0, jnp.zeros(4))
    assert runtime.last_error == 0


def test_a_handle_that_is_none_is_refused(cuda):
    with pytest.raises(RuntimeError, match="cudaIpcOpenMemHandle failed with code 1"):
        cuda.open_handle(bytes(64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nccl_reaches_the_workers_of_several_servers(dtype):
    log: list[str] = []
    runtime, library = FakeRuntime(log), FakeNccl(log)
    cuda, nccl = jaxrft_cuda.Cuda(runtime, FakeDriver()), jaxrft_cuda.Nccl(library)
    transport = NcclBroadcast(jax.devices()[0], 512, [2, 1, 4], cuda=cuda, nccl=nccl)
    assert (transport.name, transport.slots, transport.put_first) == ("nccl", 1, False)
    with pytest.raises(RuntimeError, match="not connected"):
        transport.put(0, jnp.zeros(4))
    transport.connect()
    descriptions = [json.loads(json.dumps(transport.describe(server))) for server in range(3)]
    assert [d["first_rank"] for d in descriptions] == [1, 3, 4]
    workers = [
        nccl.join(bytes.fromhex(d["id"]), d["ranks"], d["first_rank"] + rank)
        for d, count in zip(descriptions, [2, 1, 4])
        for rank in range(count)
    ]
    assert sorted(library.joined.values()) == [(8, rank) for rank in range(8)]
    assert {(d["kind"], d["slot_bytes"]) for d in descriptions} == {("nccl", 512)}
    packed = bucket(0, 100, dtype)
    transport.put(0, packed)
    assert log[-2:] == ["ncclBroadcast", "cudaStreamSynchronize"]
    received = ctypes.create_string_buffer(packed.nbytes)
    nccl.broadcast(workers[-1], ctypes.addressof(received), packed.nbytes)
    assert received.raw == np.asarray(packed).tobytes()
    transport.close()
    transport.close()
    assert len(library.joined) == 7


def test_nccl_says_which_call_failed():
    library = FakeNccl()
    nccl = jaxrft_cuda.Nccl(library)
    assert nccl.version() == 22705
    cuda = jaxrft_cuda.Cuda(FakeRuntime(), FakeDriver())
    transport = NcclBroadcast(jax.devices()[0], 512, [1], cuda=cuda, nccl=nccl)
    library.failing["ncclCommInitRank"] = [6]
    with pytest.raises(RuntimeError, match="ncclCommInitRank failed with code 6: NCCL's words for 6"):
        transport.connect()
    transport.close()
    assert "ncclCommAbort" not in library.log


def isolated(code: str, *arguments: object) -> list[str]:
    """Lines printed by a Python that has the server's modules and none besides the standard library's."""
    code = f"import sys; sys.path.insert(0, {str(SERVER_SIDE)!r})\n{code}"
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


@pytest.mark.parametrize(("name", "libraries"), [("Cuda", ("libcudart.so", "libcuda.so")), ("Nccl", ("libnccl.so",))])
def test_without_cuda_the_module_imports_and_says_what_is_missing(name, libraries):
    code = f"""
import importlib.util
import jaxrft_cuda
assert not any(importlib.util.find_spec(other) for other in ("jax", "torch", "numpy", "jaxrft"))
try:
    jaxrft_cuda.{name}()
    print("made")
except OSError as error:
    print(error)
"""
    [line] = isolated(code)
    if line == "made":
        pytest.skip("this system has the libraries")
    assert line.startswith(tuple(f"{library} is missing: it is not loaded" for library in libraries))


def test_a_loaded_library_is_found_first_then_a_wheel(tmp_path):
    """Stand-ins for the libraries: copies of one that anything can load."""
    import numpy.random._common as common

    wheel, elsewhere = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2", tmp_path / "elsewhere"
    copies = [wheel, elsewhere / "libnccl-net.so", elsewhere / "libnccl-0123abcd.so.2"]
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(common.__file__).read_bytes())
    code = """
import ctypes, jaxrft_cuda
find = lambda: print(jaxrft_cuda._load("nccl", (".2", ""), ("nccl",))._name)
other, loaded, site = sys.argv[1:]
sys.path.append(site)
ctypes.CDLL(other)
print(next(jaxrft_cuda._candidates("nccl", (".2", ""), ("nccl",))))
ctypes.CDLL(loaded)
find()
"""
    assert isolated(code, copies[1], copies[2], tmp_path) == [str(wheel), str(copies[2])]


class Reader:
    """A process that stands for a worker of a server."""

    def __init__(self, description: dict, rank: int = 0):
        script = Path(__file__).with_name("read_shared.py")
        command = [sys.executable, str(script), json.dumps(description), str(rank)]
        environment = {**os.environ, "PYTHONPATH": str(SERVER_SIDE)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def wait_open(self) -> None:
        assert self._process.stdout.readline() == "open\n"

    def ask(self, slot: int, size: int) -> None:
        self._process.stdin.write(f"{slot} {size}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        return self._process.stdout.readline().strip()

    def finish(self) -> None:
        rest, _ = self._process.communicate(timeout=60)
        assert (rest, self._process.returncode) == ("closed\n", 0)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def sha256(packed: jax.Array) -> str:
    return hashlib.sha256(np.asarray(packed).tobytes()).hexdigest()


@pytest.mark.gpu
def test_another_process_reads_what_jax_computed_on_its_gpu():
    slot_bytes = 8 << 20
    devices = jax.devices()
    transport = CudaIpc(devices, slot_bytes)
    reader = Reader(transport.describe(0))
    try:
        reader.wait_open()
        latest = {}
        # Both slots in turn, twice; each time both are read, so that a wrong offset would show.
        for seed, (dtype, elements) in enumerate(
            [("float32", slot_bytes // 4), ("bfloat16", slot_bytes // 2), ("bfloat16", 12345), ("float32", 1001)]
        ):
            packed = _replicated(bucket(seed, elements, dtype), devices)
            transport.put(seed % 2, packed)
            latest[seed % 2] = packed
            for slot, expected in latest.items():
                reader.ask(slot, expected.nbytes)
                assert reader.answer() == sha256(expected)
        reader.finish()
    finally:
        reader.kill()
        transport.close()


def _replicated(packed: jax.Array, devices: list[jax.Device]) -> jax.Array:
    mesh = jax.make_mesh((len(devices),), ("fsdp",), devices=devices)
    return jax.device_put(packed, jax.NamedSharding(mesh, PartitionSpec()))


@pytest.mark.gpu
def test_the_identifier_of_a_gpu_is_torchs():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch cannot use the GPU")
    cuda = jaxrft_cuda.Cuda()
    for ordinal in range(torch.cuda.device_count()):
        assert cuda.uuid(ordinal) == str(torch.cuda.get_device_properties(ordinal).uuid)


@pytest.mark.gpu
def test_cuda_says_why_it_refuses():
    cuda = jaxrft_cuda.Cuda()
    cuda.set_device(jax.devices()[0].local_hardware_id)
    with pytest.raises(RuntimeError, match="cudaMalloc failed with code 2: out of memory"):
        cuda.allocate(1 << 50)


@pytest.mark.gpu
def test_nccl_between_two_processes():
    torch = pytest.importorskip("torch")
    if len(jax.devices()) < 2 or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, for JAX and for torch: NCCL takes no two members on one")
    transport = NcclBroadcast(jax.devices()[0], 8 << 20, [1])
    reader = Reader(transport.describe(0))
    try:
        joining = threading.Thread(target=transport.connect)
        joining.start()
        reader.wait_open()
        joining.join()
        for seed, dtype in enumerate(DTYPES):
            packed = bucket(seed, 123456, dtype)
            reader.ask(0, packed.nbytes)
            transport.put(0, packed)
            assert reader.answer() == sha256(packed)
        # Leaving may wait for the other members.
        leaving = threading.Thread(target=transport.close)
        leaving.start()
        reader.finish()
        leaving.join()
    finally:
        reader.kill()
