"""The way of weights to servers: what travels together, how it is packed, shared memory, and the order of the steps."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.config import ConfigError
from jaxrft.models.names import Tensor
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.transfer import shared_memory
from jaxrft.rollout.transfer.choice import choose, gpus_of, make_transport
from jaxrft.rollout.transfer.export import Exporter
from jaxrft.rollout.transfer.plan import Bucket, Entry, make_buckets, make_entries, manifest
from jaxrft.rollout.transfer.send import Sender, coverage_problems
from jaxrft.rollout.transfer.shared_memory import SharedMemory
from tests.conftest import ROOT

SERVER_SIDE = ROOT / "jaxrft" / "rollout" / "server_side"

# ------------------------------------------------------------------ what travels together


def entry(name, size=1):
    return Entry(name, (size,), (name,), False)


def layer(number, size=1):
    names = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    names += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    return [entry(f"model.layers.{number}.{name}", size) for name in ["input_layernorm.weight", *names]]


def unit_of(name):
    """What one fused tensor of a server is made from."""
    for module in ("self_attn", "mlp"):
        if f".{module}." in name:
            return name[: name.index(module) + len(module)]
    return name


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 12, 24, 25, 1000])
def test_buckets(limit):
    """In order, none too large but for single units, no unit in two, and none that the next unit would fit into."""
    entries = [entry("model.embed_tokens.weight", 20), entry("model.norm.weight"), *layer(0), *layer(1), *layer(11)]
    buckets = make_buckets(entries, limit)
    assert [e for bucket in buckets for e in bucket.entries] == entries
    units = [list(dict.fromkeys(unit_of(e.name) for e in bucket.entries)) for bucket in buckets]
    assert len({unit for bucket in units for unit in bucket}) == sum(map(len, units))
    sizes = {}
    for e in entries:
        sizes[unit_of(e.name)] = sizes.get(unit_of(e.name), 0) + e.elements
    for bucket, held in zip(buckets, units):
        assert bucket.elements <= limit or len(held) == 1
        assert bucket.elements == sum(e.elements for e in bucket.entries)
    if limit == 1000:
        assert len(buckets) == 1
    for bucket, after in zip(buckets, units[1:]):
        # The embedding and the norms of a layer are of no unit but their own; they may be taken with their module.
        assert bucket.elements + sum(sizes[unit] for unit in after[:2]) > limit


def test_places():
    bucket = Bucket((Entry("a", (2, 3), ("a",), False), Entry("b", (), ("b",), False), Entry("c", (4,), ("c",), True)))
    assert bucket.places() == [("a", [2, 3], 0), ("b", [], 6), ("c", [4], 7)]
    assert bucket.elements == 11
    assert manifest([bucket, Bucket(())], "bfloat16") == {
        "dtype": "bfloat16",
        "tensors": [("a", [2, 3]), ("b", []), ("c", [4])],
    }


def test_entries():
    """Shapes are those of the files; tied embeddings go a second time where a server wants both."""
    tensors = {("embed",): Tensor("model.embed_tokens.weight", False), ("up",): Tensor("up_proj.weight", True)}
    shapes = {("up",): (3, 5), ("embed",): (7, 3)}
    plain = [
        Entry("model.embed_tokens.weight", (7, 3), ("embed",), False),
        Entry("up_proj.weight", (5, 3), ("up",), True),
    ]
    assert make_entries(tensors, shapes) == plain
    both = make_entries(tensors, shapes, output_of=("embed",))
    assert both == [*plain, Entry("lm_head.weight", (7, 3), ("embed",), False)]
    assert make_buckets(both, 1000) == [Bucket(tuple(both))]


# ------------------------------------------------------------------ how it is packed


def random_bucket(seed):
    """Parameters of random shapes, and the tensors that files have of them."""
    rng = np.random.default_rng(seed)
    entries, values = [], {}
    for i in range(int(rng.integers(1, 7))):
        transposed = bool(rng.integers(2))
        shape = tuple(int(n) for n in rng.integers(1, 9, 2 if transposed else rng.integers(1, 4)))
        values[i,] = rng.standard_normal(shape).astype(np.float32)
        entries.append(Entry(f"t{i}", shape[::-1] if transposed else shape, (i,), transposed))
    return Bucket(tuple(entries)), values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packing(dtype):
    for seed in range(4):
        bucket, values = random_bucket(seed)
        arrays = {path: jnp.asarray(value) for path, value in values.items()}
        packed = Exporter(arrays[0,], dtype).pack(bucket, arrays)
        assert packed.dtype == dtype
        assert packed.shape == (bucket.elements,)
        for (_, shape, first), e in zip(bucket.places(), bucket.entries):
            expected = values[e.path].astype(jnp.dtype(dtype))
            expected = np.swapaxes(expected, 0, 1) if e.transposed else expected
            found = np.asarray(packed)[first : first + e.elements].reshape(shape)
            np.testing.assert_array_equal(found, expected)


def test_packing_of_shards(run_python):
    """Each of 8 devices gets the whole, from parameters split along either axis or along both."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrft.rollout.transfer.export import Exporter
from jaxrft.rollout.transfer.plan import Bucket, Entry

mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
specs = [P("fsdp", "tensor"), P("tensor", "fsdp"), P(("fsdp", "tensor")), P(None, "tensor"), P()]
whole = [rng.standard_normal((16, 8)).astype(np.float32) for _ in specs]
values = {(i,): jax.device_put(w, NamedSharding(mesh, s)) for i, (w, s) in enumerate(zip(whole, specs))}
entries = [Entry(f"t{i}", (8, 16) if i % 2 else (16, 8), (i,), bool(i % 2)) for i in range(len(specs))]
for dtype in ("float32", "bfloat16"):
    packed = Exporter(values[0,], dtype).pack(Bucket(tuple(entries)), values)
    expected = np.concatenate([(w.T if i % 2 else w).astype(jnp.dtype(dtype)).ravel() for i, w in enumerate(whole)])
    assert len(packed.addressable_shards) == 8
    for shard in packed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected)
"""
    run_python(code, devices=8)


# ------------------------------------------------------------------ shared memory

READER = """
import json, sys, zlib
from jaxrft_memory import open_memory
memory = open_memory(json.loads(sys.argv[1]), None, 0)
print("open", flush=True)
for line in sys.stdin:
    slot, size = map(int, line.split())
    print(zlib.crc32(memory.read(slot, size).numpy().tobytes()), flush=True)
memory.close()
"""


def names_left():
    return list(Path("/dev/shm").glob(f"jaxrft-{os.getpid()}-*"))


def test_another_process_reads_what_is_put():
    """Two slots, each on its own; the name is gone while the memory is in use, and nobody else may open it before."""
    transport = SharedMemory(slot_bytes=5000)
    (path,) = names_left()
    assert path.stat().st_mode & 0o777 == 0o600
    arguments = [sys.executable, "-c", READER, json.dumps(transport.describe(0))]
    environment = {**os.environ, "PYTHONPATH": str(SERVER_SIDE)}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as reader:

        def line():
            return reader.stdout.readline().strip()

        def ask(slot, size):
            reader.stdin.write(f"{slot} {size}\n")
            reader.stdin.flush()
            return int(line())

        assert line() == "open"
        transport.opened()
        assert not names_left()
        rng = np.random.default_rng(0)
        held = {}
        for slot, size, dtype in ((0, 1250, "float32"), (1, 2500, "bfloat16"), (0, 7, "bfloat16")):
            data = rng.integers(0, 256, size * jnp.dtype(dtype).itemsize, np.uint8)
            transport.put(slot, jnp.asarray(data.view(jnp.dtype(dtype))))
            held[slot] = data
            for other, expected in held.items():
                assert ask(other, len(expected)) == zlib.crc32(expected.tobytes())
        reader.stdin.close()
        assert reader.wait(30) == 0
    transport.close()
    transport.close()


def test_no_name_is_left_where_servers_never_opened_it():
    transport = SharedMemory(slot_bytes=10)
    assert len(names_left()) == 1
    transport.close()
    assert not names_left()


def test_too_little_shared_memory(monkeypatch):
    def refuse(handle, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handles = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.bucket_mib: 6 MiB of .* \(No space left on device\)"):
        SharedMemory(slot_bytes=3 * 2**20)
    assert not names_left()
    assert len(os.listdir("/proc/self/fd")) == handles


# ------------------------------------------------------------------ the order of the steps


class MemoryTransport:
    """Slots in this process, which may not be written to while somebody reads them."""

    name, put_first = "fake", True

    def __init__(self, log, slots=2):
        self.slots, self.log = slots, log
        self.data, self.readers = {}, []

    def describe(self, server):
        return {"server": server}

    def connect(self):
        self.log.append("connect")

    def opened(self):
        self.log.append("opened")

    def put(self, slot, packed):
        assert slot not in self.readers, "a slot is overwritten while a server reads it"
        self.data[slot] = np.asarray(packed).tobytes()
        self.log.append(f"put {slot}")

    def close(self):
        self.log.append("close")


class Receiver:
    """Takes weights, for ``seconds`` a bucket; ``fail`` names the step that raises."""

    def __init__(self, name, log, transport, seconds=0.0, fail=None, answer=None):
        self.name, self.log, self.transport, self.seconds, self.fail = name, log, transport, seconds, fail
        self.answer, self.tensors = answer, {}

    def step(self, step):
        self.log.append(f"{self.name} {step}")
        if step == self.fail:
            raise EngineError(f"{self.name}: {step} failed")

    def check(self, manifest):
        self.step("check")
        taken = [int(np.prod(shape)) for _, shape in manifest["tensors"]]
        return [{"problems": [], "taken": taken}] if self.answer is None else self.answer

    def open(self, memory):
        self.step("open")
        self.place = memory["server"]

    def begin(self):
        self.step("begin")

    def load(self, bucket):
        slot = bucket["slot"]
        self.transport.readers.append(slot)
        time.sleep(self.seconds)
        data = self.transport.data[slot]
        self.transport.readers.remove(slot)
        assert len(data) == bucket["bytes"]
        self.checksum, self.found = bucket["checksum"], zlib.crc32(data)
        self.step("load")
        values = np.frombuffer(data, np.float32)
        for name, shape, first in bucket["tensors"]:
            self.tensors[name] = values[first : first + int(np.prod(shape))].reshape(shape)

    def finish(self, tensors, version):
        self.step("finish")
        self.finished = (tensors, version)

    def release(self, sender):
        self.log.append(f"{self.name} release")


COUNT = 6


@pytest.fixture
def weights():
    return {(i,): jnp.asarray(np.random.default_rng(i).standard_normal((3, 4)), jnp.float32) for i in range(COUNT)}


def sender_of(log, weights, changes=({}, {}), **options):
    transport = MemoryTransport(log)
    receivers = [Receiver(name, log, transport, **change) for name, change in zip("ab", changes)]
    buckets = [Bucket((Entry(f"t{i}", (4, 3), (i,), True),)) for i in range(COUNT)]
    return Sender(receivers, transport, buckets, Exporter(weights[0,], "float32"), "float32", **options), receivers


@pytest.mark.parametrize("seconds", [(0.0, 0.02), (0.02, 0.0)])
def test_a_transfer(weights, seconds):
    """Every server ends with every tensor, one slower than the other; each step waits for the one before it."""
    log = []
    sender, receivers = sender_of(log, weights, [{"seconds": s} for s in seconds], checksum=True)
    assert log[:2] == ["a check", "b check"]
    assert sorted(log[2:4] + log[4:5]) == ["a open", "b open", "connect"]
    assert log[5:] == ["opened"]
    assert [r.place for r in receivers] == [0, 1]
    del log[:]
    report = sender.send(weights, 7)
    for receiver in receivers:
        assert receiver.finished == (COUNT, 7)
        assert receiver.checksum == receiver.found
        for i in range(COUNT):
            np.testing.assert_array_equal(receiver.tensors[f"t{i}"], np.asarray(weights[i,]).T)
    assert sorted(log[:2]) == ["a begin", "b begin"]
    assert sorted(log[-2:]) == ["a finish", "b finish"]
    assert [line for line in log if line.startswith("put")] == [f"put {i % 2}" for i in range(COUNT)]
    assert (report.bytes, report.buckets) == (COUNT * 48, COUNT)
    assert report.seconds > 0
    sender.close()
    assert log[-3:] == ["a release", "b release", "close"]


def test_no_checksum_unless_asked_for(weights):
    sender, (receiver, _) = sender_of([], weights)
    sender.send(weights, 0)
    assert receiver.checksum is None
    sender.close()


@pytest.mark.parametrize("step", ["begin", "load", "finish"])
def test_a_server_that_fails(weights, step):
    """The error comes when no server reads any more; the others are not told to go on, and a new transfer succeeds."""
    log = []
    sender, (failing, other) = sender_of(log, weights, [{"fail": step}, {"seconds": 0.02}])
    del log[:]
    with pytest.raises(EngineError, match=f"^a: {step} failed$"):
        sender.send(weights, 1)
    assert not sender.transport.readers
    later = {"begin": "put 0", "load": "b finish", "finish": "close"}[step]
    assert later not in log
    failing.fail = None
    sender.send(weights, 2)
    assert [r.finished for r in (failing, other)] == [(COUNT, 2)] * 2
    sender.close()


def test_a_way_without_slots(weights):
    """Where bytes are sent while servers wait for them, they are told first."""
    log = []
    transport = MemoryTransport(log, slots=1)
    transport.put_first = False
    here = threading.Event()
    transport.put = lambda slot, packed: (transport.data.update({slot: np.asarray(packed).tobytes()}), here.set())
    receiver = Receiver("a", log, transport)
    load = receiver.load
    receiver.load = lambda bucket: here.wait(10) and (here.clear(), load(bucket))
    buckets = [Bucket((Entry(f"t{i}", (4, 3), (i,), True),)) for i in range(COUNT)]
    sender = Sender([receiver], transport, buckets, Exporter(weights[0,], "float32"), "float32")
    sender.send(weights, 0)
    for i in range(COUNT):
        np.testing.assert_array_equal(receiver.tensors[f"t{i}"], np.asarray(weights[i,]).T)
    sender.close()


# ------------------------------------------------------------------ coverage


def test_a_model_that_would_not_be_filled(weights):
    """Nothing is begun or opened, and everything is given back."""
    log = []
    answer = [{"problems": [f"weight {i} would not be filled" for i in range(7)], "taken": [12] * COUNT}]
    with pytest.raises(EngineError, match=r"^b: .*: weight 0 would.*weight 4 would[^;]*; and 2 more\. Nothing"):
        sender_of(log, weights, [{}, {"answer": answer}])
    assert log == ["a check", "b check", "a release", "b release", "close"]


TENSORS = [("whole", [4, 6]), ("split", [8, 2])]


@pytest.mark.parametrize(
    ("answers", "problems"),
    [
        ([([], [24, 16])], []),
        # Split over two workers; and held whole by each.
        ([([], [12, 16]), ([], [12, 16])], []),
        ([([], [24, 0])], ["split has no place in it"]),
        ([([], [12, 8]), ([], [12, 0])], ["split of shape [8, 2] is too large: 8 of its elements are taken"]),
        ([(["b lacks"], [0, 0]), (["a lacks", "b lacks"], [])], ["a lacks", "b lacks"]),
    ],
)  # fmt: skip
def test_coverage_over_workers(answers, problems):
    answers = [{"problems": lines, "taken": taken} for lines, taken in answers]
    assert coverage_problems(TENSORS, answers) == problems


# ------------------------------------------------------------------ the choice of a transport


def worker(device="cpu", host="here"):
    return {"device": device, "host": host}


CHOICES = [  # The trainer's GPUs, the workers of each server -> what fits, the fastest first.
    ([], [[worker()]], ["shared_memory"]),
    ([], [[worker("G0")]], ["shared_memory"]),
    (["G0"], [[worker("G0")]], ["cuda_ipc", "shared_memory"]),
    (["G0", "G1"], [[worker("G0")], [worker("G1")]], ["cuda_ipc", "shared_memory"]),
    (["G0", "G1"], [[worker("G1")]], ["cuda_ipc", "nccl", "shared_memory"]),
    (["G0"], [[worker("G1"), worker("G2")]], ["nccl", "shared_memory"]),
    (["G0"], [[worker("G0"), worker("G1")]], ["shared_memory"]),
    (["G0"], [[worker()]], ["shared_memory"]),
    (["G0"], [[worker("G1")], [worker("G2", "there")]], ["nccl"]),
    (["G0"], [[worker("G0", "there")]], []),
    (["G0"], [[worker("cpu", "there")]], []),
    ([], [[worker("G1", "there")]], []),
]


@pytest.mark.parametrize(("own", "servers", "fitting"), CHOICES)
def test_choice(own, servers, fitting):
    for kind in ("cuda_ipc", "nccl", "shared_memory"):
        if kind in fitting:
            assert choose(kind, servers, "here", own) == kind
        else:
            with pytest.raises(ConfigError, match=rf"^rollout\.vllm\.transport: {kind} needs"):
                choose(kind, servers, "here", own)
    if fitting:
        assert choose("auto", servers, "here", own) == fitting[0]
    else:
        place = "GPUs" if own else "a CPU"
        with pytest.raises(ConfigError, match=rf"^rollout\.vllm\.transport: no transport .* trainer on {place};"):
            choose("auto", servers, "here", own)


def test_shared_memory_is_made_for_a_trainer_on_a_cpu():
    assert gpus_of(jax.devices()) == {}
    transport = make_transport("shared_memory", [[worker()]], {}, 100)
    assert (transport.name, transport.describe(3)["kind"]) == ("shared_memory", "shared_memory")
    transport.close()
