"""What runs inside a server's own environment, with an application, a model and processes in place of vLLM's."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import ROOT

SERVER_SIDE = ROOT / "jaxrft" / "rollout" / "server_side"
# Servers find these modules by their own names.
sys.path.append(str(SERVER_SIDE))

from jaxrft_coverage import Coverage  # noqa: E402
from jaxrft_guard import Guard  # noqa: E402
from jaxrft_memory import open_memory  # noqa: E402
from jaxrft_watch import start_time  # noqa: E402
from jaxrft_worker import WeightReceiver  # noqa: E402

MODULES = sorted(path.stem for path in SERVER_SIDE.glob("jaxrft_*.py"))


def test_modules_stand_alone():
    """With nothing but Python's own library beside them."""
    assert len(MODULES) == 7
    code = f"import sys; sys.path.append({str(SERVER_SIDE)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------ the guard


class App:
    """A server that notes what gets through; ``during`` is called while it works."""

    def __init__(self):
        self.paths, self.during = [], lambda: None

    async def __call__(self, scope, receive, send):
        self.paths.append(scope.get("path", scope["type"]))
        self.during()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"kept")]})
        await send({"type": "http.response.body", "body": b"inner"})


@pytest.fixture
def app():
    return App()


@pytest.fixture
def guard(app, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "right")
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="9.9"))
    return Guard(app)


def ask(guard, path, *, key="right", method="GET", chunks=(b"",), kind="http"):
    """Status, headers and body of an answer; the body of the request comes in pieces."""
    sent = []
    parts = [{"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    if kind != "http":
        return sent
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def set_state(guard, **state):
    text = json.dumps(state).encode()
    status, _, body = ask(guard, "/jaxrft/state", method="POST", chunks=(text[:5], text[5:]))
    assert status == 200
    return json.loads(body)


GENERATING = ["/inference/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]
PATHS = ["/collective_rpc", "/jaxrft/state", "/pause", "/openapi.json", "/", "/healthy", *GENERATING]


@pytest.mark.parametrize("key", [None, "wrong", "", "righ", "right "])
def test_every_path_but_health_takes_the_key(guard, app, key):
    for path in PATHS:
        for method in ("GET", "POST"):
            status, headers, body = ask(guard, path, key=key, method=method)
            assert status == 401
            assert int(headers[b"content-length"]) == len(body)
            assert json.loads(body)["error"].startswith("Unauthorized")
    assert not app.paths
    assert ask(guard, "/health", key=key)[0] == 200
    assert json.loads(ask(guard, "/jaxrft/state")[2])["status"] == "empty"


def test_the_key_itself_is_not_kept(guard):
    assert "right" not in repr(vars(guard))


def test_without_a_key_all_may_ask(app, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert ask(Guard(app), "/pause", key=None)[0] == 200


def test_nothing_is_generated_without_whole_weights(guard, app):
    """Not before the first transfer, not while one runs, and not after one that was broken off."""
    reasons = {"empty": b"no weights have come yet", "loading": b"a transfer of weights has not been completed"}
    for state in ("empty", "loading"):
        if state == "loading":
            set_state(guard, status="ready", version=3)
            assert set_state(guard, status="loading") == {
                "protocol": 1, "vllm": "9.9", "status": "loading", "version": 3
            }  # fmt: skip
        for path in [*GENERATING, "/generate", "/invocations"]:
            status, _, body = ask(guard, path, method="POST")
            assert status == 503
            assert reasons[state] in body
    assert not app.paths
    assert ask(guard, "/collective_rpc")[0] == 200
    set_state(guard, status="ready", version=4)
    for path in GENERATING:
        assert ask(guard, path)[2] == b"inner"
    assert app.paths == ["/collective_rpc", *GENERATING]


def test_answers_carry_the_versions_before_and_after(guard, app):
    set_state(guard, status="ready", version=4)
    headers = ask(guard, GENERATING[0])[1]
    assert headers == {b"x-own": b"kept", b"x-jaxrft-version-before": b"4", b"x-jaxrft-version": b"4"}
    app.during = lambda: setattr(guard, "_version", 5)
    headers = ask(guard, GENERATING[0])[1]
    assert (headers[b"x-jaxrft-version-before"], headers[b"x-jaxrft-version"]) == (b"4", b"5")


def test_other_protocols(guard, app):
    """A server's own start and end pass; a websocket is closed, with the key or without."""
    set_state(guard, status="ready", version=0)
    for key in ("right", None):
        assert ask(guard, "/v1/realtime", key=key, kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert not app.paths
    ask(guard, None, kind="lifespan")
    assert len(app.paths) == 1


# ------------------------------------------------------------------ the watch

# A server with a child in its group; both may be deaf to a polite request.
SERVER = """
import os, signal, subprocess, sys, time
sys.path.append(sys.argv[1])
import jaxrft_watch
jaxrft_watch.SECONDS_TO_END = 0.3
if sys.argv[4] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
jaxrft_watch.watch(int(sys.argv[2]), int(sys.argv[3]), 0.05)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(100)
"""
# Their owner, which starts them as a trainer does.
OWNER = """
import os, subprocess, sys, time
sys.path.append(sys.argv[1])
from jaxrft_watch import start_time
words = [sys.executable, "-S", "-c", sys.argv[2], sys.argv[1], str(os.getpid()), str(start_time(os.getpid()))]
subprocess.Popen([*words, sys.argv[3]], start_new_session=True)
time.sleep(100)
"""


def members(group):
    """Living processes of a group."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getpgid(int(entry)) == group and start_time(int(entry)) is not None:
                found.append(int(entry))
    return found


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.parametrize(("killed", "how"), [("owner", "polite"), ("owner", "deaf"), ("server", "polite")])
def test_nothing_outlives_its_owner(killed, how):
    """Killed by SIGKILL, the owner or the server itself, neither of which can do anything more about it."""
    arguments = [sys.executable, "-S", "-c", OWNER, str(SERVER_SIDE), SERVER, how]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, bufsize=1) as owner:
        server, child = map(int, owner.stdout.readline().split())
        try:
            assert os.getpgid(child) == server != os.getpgid(owner.pid)
            assert len(members(server)) == 3, "server, child and watch"
            os.kill(owner.pid if killed == "owner" else server, signal.SIGKILL)
            until(lambda: not members(server))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server, signal.SIGKILL)
            owner.kill()


def test_start_time():
    """Names a process for good: the same at each look, None of one that has ended or is a zombie."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(process.pid)
    assert started == start_time(process.pid) >= start_time(os.getpid())
    process.stdin.close()
    until(lambda: start_time(process.pid) is None)
    assert os.path.exists(f"/proc/{process.pid}"), "it is a zombie still"
    process.wait()
    assert start_time(process.pid) is None


def test_start_time_of_a_name_with_parentheses(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "100"]) as process:
        until(lambda: "Z 1" in Path(f"/proc/{process.pid}/stat").read_text())
        assert start_time(process.pid) >= start_time(os.getpid())
        process.kill()


# ------------------------------------------------------------------ coverage

HIDDEN, HEADS, VOCAB = 6, 8, 10


class Model(nn.Module):
    """Attention whose queries, keys and values are one parameter, and a vocabulary with room to spare."""

    def __init__(self, rank=0, ranks=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.ranks, self.rows = rank, ranks, HEADS // ranks
        self.qkv = nn.Parameter(torch.empty(3 * self.rows, HIDDEN, dtype=dtype))
        self.norm = nn.Parameter(torch.empty(HIDDEN, dtype=dtype))
        self.vocabulary = nn.Parameter(torch.empty((VOCAB + 6) // ranks, HIDDEN, dtype=dtype))

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in "qkv":
                mine = tensor.narrow(0, self.rank * self.rows, self.rows)
                self.qkv.data.narrow(0, "qkv".index(name) * self.rows, self.rows).copy_(mine)
            elif name == "vocabulary":
                first, size = self.rank * len(self.vocabulary), len(self.vocabulary)
                mine = tensor[first : first + size]
                self.vocabulary.data[: len(mine)].copy_(mine)
                self.vocabulary.data[len(mine) :].fill_(0)
            elif name == "norm":
                parameters[name].data.copy_(tensor)
            elif not name.startswith("ignored"):
                raise KeyError(name)


FITTING = {"q": [HEADS, HIDDEN], "k": [HEADS, HIDDEN], "v": [HEADS, HIDDEN], "norm": [HIDDEN]}
FITTING["vocabulary"] = [VOCAB, HIDDEN]


def examine(tensors, **model):
    with torch.device("meta"):
        made = Model(**model)
    return Coverage(made).examine("float32", list(tensors.items()))


def test_coverage_of_a_model_that_is_filled():
    answer = examine(FITTING)
    assert answer == {"problems": [], "taken": [48, 48, 48, 6, 60]}
    assert examine(FITTING | {"ignored": [3]})["taken"][-1] == 0


def test_coverage_over_two_ranks():
    """Each takes its part; the end of the vocabulary, and the padding behind it, are the second's."""
    answers = [examine(FITTING, rank=rank, ranks=2) for rank in (0, 1)]
    assert [answer["problems"] for answer in answers] == [[], []]
    assert [answer["taken"] for answer in answers] == [[24, 24, 24, 6, 48], [24, 24, 24, 6, 12]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"norm": None}, "norm would not be filled"),
        ({"k": None}, "qkv would be filled by 96 of its 144 elements"),
        ({"norm": [HIDDEN + 1]}, r"norm of shape \[7\] does not fit .*the server wants shape \[6\]"),
        ({"v": [HEADS - 3, HIDDEN]}, r"v of shape \[5, 6\] does not fit"),
        ({"more": [2]}, r"more of shape \[2\] does not fit \(KeyError: 'more'\)"),
        ({}, "norm has type bfloat16, gets float32"),
    ],
)
def test_coverage_of_a_model_that_is_not(changes, problem):
    tensors = {name: shape for name, shape in (FITTING | changes).items() if shape is not None}
    answer = examine(tensors, **({} if changes else {"dtype": torch.bfloat16}))
    assert any(re.match(problem, line) for line in answer["problems"]), answer


def test_coverage_touches_nothing():
    """Also of a model that has memory."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    Coverage(model).examine("float32", list(FITTING.items()))
    assert all((parameter == 3).all() for parameter in model.parameters())


# ------------------------------------------------------------------ the receiver


class Worker(WeightReceiver):
    """A worker of vLLM as far as the receiver looks at it."""

    def __init__(self, model):
        self.model_runner = types.SimpleNamespace(model=model)
        self.vllm_config = types.SimpleNamespace(model_config="its config")
        self.device, self.rank = torch.device("cpu"), 0


@pytest.fixture
def reload(monkeypatch):
    """vLLM's module for loading again; what is asked of it, in order."""
    calls = []
    module = types.SimpleNamespace(
        initialize_layerwise_reload=lambda model: calls.append("initialize"),
        finalize_layerwise_reload=lambda model, config: calls.append(f"finalize with {config}"),
    )
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].reload = module
    return calls


@pytest.fixture
def worker():
    return Worker(Model())


SLOT = 1024


@pytest.fixture
def memory(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(2 * SLOT))
    return path


def put(memory, slot, named):
    """Packs tensors into a slot; the bucket as the trainer describes it."""
    packed = np.concatenate([value.ravel() for value in named.values()]).astype(np.float32)
    with memory.open("r+b") as file:
        file.seek(slot * SLOT)
        file.write(packed.tobytes())
    firsts = np.cumsum([0, *(value.size for value in named.values())])
    tensors = [[name, list(value.shape), int(first)] for (name, value), first in zip(named.items(), firsts)]
    described = {"sender": "trainer", "slot": slot, "bytes": packed.nbytes, "dtype": "float32", "tensors": tensors}
    return described | {"checksum": zlib.crc32(packed.tobytes())}


def random_tensors(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in FITTING.items()}


def opened(worker, memory):
    described = {"sender": "trainer", "kind": "shared_memory", "path": str(memory), "slot_bytes": SLOT}
    assert worker.jaxrft_open(json.dumps(described)) == {}


def assert_holds(model, tensors):
    expected = np.concatenate([tensors[name] for name in "qkv"])
    np.testing.assert_array_equal(model.qkv.detach().numpy(), expected)
    np.testing.assert_array_equal(model.norm.detach().numpy(), tensors["norm"])
    np.testing.assert_array_equal(model.vocabulary[:VOCAB].detach().numpy(), tensors["vocabulary"])


def load(worker, memory, tensors):
    first = {name: tensors[name] for name in "qkv"}
    rest = {name: tensors[name] for name in ("norm", "vocabulary")}
    for slot, named in enumerate((first, rest)):
        assert worker.jaxrft_load(json.dumps(put(memory, slot, named))) == {"tensors": len(named)}


def test_a_transfer(worker, memory, reload):
    opened(worker, memory)
    assert "without jaxrft_begin" in worker.jaxrft_load("{}")["error"]
    for seed in (0, 1):
        tensors = random_tensors(seed)
        assert worker.jaxrft_begin() == {}
        load(worker, memory, tensors)
        assert worker.jaxrft_finish("5") == {}
        assert_holds(worker.model_runner.model, tensors)
    assert reload == ["initialize", "finalize with its config"] * 2
    assert "without jaxrft_begin" in worker.jaxrft_load("{}")["error"]
    assert "0 tensors came of 5" in worker.jaxrft_finish("5")["error"]


def test_a_transfer_to_a_server_that_cannot_load_again(worker, memory, monkeypatch):
    """Before vLLM had a module for it, weights were simply loaded."""
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    opened(worker, memory)
    tensors = random_tensors(0)
    worker.jaxrft_begin()
    load(worker, memory, tensors)
    assert worker.jaxrft_finish("5") == {}
    assert_holds(worker.model_runner.model, tensors)


def test_a_transfer_that_was_broken_off(worker, memory, reload):
    """What it left half done is ended before the next one begins; tensors that came then do not count now."""
    opened(worker, memory)
    worker.jaxrft_begin()
    load(worker, memory, random_tensors(0))
    tensors = random_tensors(1)
    assert worker.jaxrft_begin() == {}
    assert reload == ["initialize", "finalize with its config", "initialize"]
    assert "0 tensors came of 5" in worker.jaxrft_finish("5")["error"]
    load(worker, memory, tensors)
    assert worker.jaxrft_finish("5") == {}
    assert_holds(worker.model_runner.model, tensors)


def test_a_damaged_bucket(worker, memory, reload):
    """Nothing of it is loaded, and the transfer cannot be finished."""
    opened(worker, memory)
    worker.jaxrft_begin()
    before = random_tensors(0)
    load(worker, memory, before)
    bucket = put(memory, 0, {"norm": random_tensors(1)["norm"]})
    with memory.open("r+b") as file:
        file.write(b"\x01")
    answer = worker.jaxrft_load(json.dumps(bucket))
    assert f"{bucket['checksum']} at the trainer" in answer["error"]
    assert_holds(worker.model_runner.model, before)
    assert worker.jaxrft_load(json.dumps(bucket | {"checksum": None})) == {"tensors": 1}


def test_a_transfer_that_lacks_tensors(worker, memory, reload):
    opened(worker, memory)
    worker.jaxrft_begin()
    worker.jaxrft_load(json.dumps(put(memory, 0, {"norm": random_tensors(0)["norm"]})))
    # The same one twice is one.
    worker.jaxrft_load(json.dumps(put(memory, 0, {"norm": random_tensors(0)["norm"]})))
    assert worker.jaxrft_finish("2") == {"error": "1 tensors came of 2"}
    assert reload == ["initialize"]


def test_what_is_raised_is_answered(worker, memory, reload):
    """An exception in a worker could end the server."""
    assert worker.jaxrft_open('{"kind": "pigeon"}') == {"error": "ValueError: transport 'pigeon' is not known here"}
    missing = json.dumps({"kind": "shared_memory", "path": "/dev/shm/no-such", "slot_bytes": 1})
    assert worker.jaxrft_open(missing)["error"].startswith("FileNotFoundError: ")
    opened(worker, memory)
    worker.jaxrft_begin()
    bucket = put(memory, 0, {"unknown": np.zeros(3, np.float32)})
    assert worker.jaxrft_load(json.dumps(bucket)) == {"error": "KeyError: 'unknown'"}
    too_long = put(memory, 1, {"norm": np.zeros(6, np.float32)}) | {"bytes": 10 * SLOT}
    assert "error" in worker.jaxrft_load(json.dumps(too_long))
    assert worker.jaxrft_close('"trainer"') == {}
    assert worker.jaxrft_close('"trainer"') == {}
    assert "error" in worker.jaxrft_load(json.dumps(bucket))


def test_one_sender_at_a_time(worker, memory, reload):
    """Another's buckets are refused, and its end is not this one's."""
    opened(worker, memory)
    worker.jaxrft_begin()
    bucket = put(memory, 0, {"norm": random_tensors(0)["norm"]})
    refused = worker.jaxrft_load(json.dumps(bucket | {"sender": "another"}))
    assert refused == {"error": "another trainer sends weights to this server: one at a time"}
    assert worker.jaxrft_close('"another"') == {}
    assert worker.jaxrft_load(json.dumps(bucket)) == {"tensors": 1}


def test_check_answers_for_the_model(worker, monkeypatch):
    with torch.device("meta"):
        shapes = Model()
    monkeypatch.setattr(worker, "_jaxrft_shapes", lambda: shapes, raising=False)
    manifest = {"dtype": "float32", "tensors": list(FITTING.items())}
    assert worker.jaxrft_check(json.dumps(manifest)) == {"problems": [], "taken": [48, 48, 48, 6, 60]}


def test_memory_is_closed_and_opened_anew(memory):
    described = {"kind": "shared_memory", "path": str(memory), "slot_bytes": SLOT}
    put(memory, 1, {"norm": np.arange(6, dtype=np.float32)})
    opened = open_memory(described, torch.device("cpu"), 0)
    held = opened.read(1, 24)
    opened.close()
    # A tensor that still refers to it stays whole.
    assert held.view(torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


# ------------------------------------------------------------------ the launcher's extension of the command line


def test_an_environment_without_vllm():
    done = subprocess.run([sys.executable, "-S", str(SERVER_SIDE / "jaxrft_server.py")], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("jaxrft-refused: ")
    assert "has no vLLM" in done.stderr
    assert len(done.stderr.splitlines()) == 1
