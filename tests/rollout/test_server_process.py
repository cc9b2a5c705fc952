"""Servers as processes: programs of a few lines in place of vLLM, and what is said where one does not start."""

import contextlib
import gc
import json
import os
import socket
import stat
import sys
import textwrap
import time
import weakref

import httpx
import pytest

from jaxrft.config import ConfigError
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.server_side.jaxrft_watch import start_time
from jaxrft.rollout.vllm import process, server
from jaxrft.rollout.vllm.options import ServerOptions, cpu_cores
from jaxrft.rollout.vllm.process import ServerProcess, check_free, free_port, reason_in
from jaxrft.rollout.vllm.server import Server
from tests.rollout.fake_server import worker

# Answers at /health from its second question on, with a child beside it; notes how it was started.
ANSWERING = """
import http.server, json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
notes = {"arguments": sys.argv, "key": os.environ["VLLM_API_KEY"], "owner": os.environ["JAXRFT_OWNER"]}
notes |= {"pid": os.getpid(), "group": os.getpgrp(), "child": child.pid}
print(json.dumps(notes), flush=True)
asked = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(200 if len(asked) > 1 else 503)
        self.end_headers()
        if self.path == "/fail":
            print("(EngineCore pid=7) ERROR 11-24 19:27:25 [core.py:12] it hurts", flush=True)
            print("INFO 11-24 19:27:25 [core.py:13] an ERROR in words only", flush=True)
        if self.path == "/end":
            print("RuntimeError: asked to end", flush=True)
            os._exit(5)
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SILENT = "import time\nprint('loading weights', flush=True)\ntime.sleep(100)\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SILENT


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a program in place of a Python with vLLM; whatever is left of it is ended."""
    monkeypatch.setattr(process, "POLL_SECONDS", 0.02)
    made: weakref.WeakSet = weakref.WeakSet()

    def start(code, **changes):
        program = tmp_path / "python"
        program.write_text(f"#!{sys.executable} -S\n{textwrap.dedent(code)}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        values = {"python": str(program), "port": free_port()} | changes
        options = ServerOptions(
            model=tmp_path, dtype="float32", max_length=8, max_sequences=2, logprobs_mode="raw_logprobs",
            tokenizer=False, **values,
        )  # fmt: skip
        running = ServerProcess(options, tmp_path / "logs" / "server.log", "server 0")
        made.add(running)
        return running

    yield start
    for each in list(made):
        each.stop()


def notes_of(running):
    return json.loads(running.log.read_text().splitlines()[0])


def gone(*pids):
    return all(start_time(pid) is None for pid in pids)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_a_server_that_answers(started):
    """It has a group of its own, knows its owner, has its key in the environment only; nothing of it is left."""
    running = started(ANSWERING)
    running.wait(30)
    notes = notes_of(running)
    assert notes["group"] == notes["pid"] != os.getpgrp()
    assert notes["owner"] == f"{os.getpid()}:{start_time(os.getpid())}"
    assert notes["key"] == running.options.key
    assert notes["key"] not in " ".join(notes["arguments"])
    assert os.path.basename(notes["arguments"][1]) == "jaxrft_server.py"
    assert httpx.get(f"{running.url}/health").status_code == 200
    running.stop()
    running.stop()
    assert gone(notes["pid"], notes["child"])
    check_free(running.options.port)
    with pytest.raises(EngineError, match="server 0 ended with exit code -15"):
        running.check_alive()


def test_a_server_that_nobody_holds_any_more_is_ended(started, tmp_path):
    running = started(ANSWERING)
    running.wait(30)
    notes = notes_of(running)
    running.follow([].append)
    del running
    gc.collect()
    assert gone(notes["pid"], notes["child"])


def test_a_server_ends_with_an_owner_that_just_ends(tmp_path, run_python):
    """At the end of the program, with no word about it."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable} -S\n{ANSWERING}")
    program.chmod(0o700)
    code = f"""
from pathlib import Path
from jaxrft.rollout.vllm.options import ServerOptions
from jaxrft.rollout.vllm.process import ServerProcess, free_port
options = ServerOptions(model=Path("."), python={str(program)!r}, port=free_port(), dtype="float32", max_length=8,
                        max_sequences=2, logprobs_mode="raw_logprobs", tokenizer=False)
running = ServerProcess(options, Path({str(tmp_path / "log")!r}))
running.wait(30)
"""
    run_python(code)
    notes = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert gone(notes["pid"], notes["child"])


def test_errors_are_passed_on(started):
    """What the log calls an error, from the time on that someone follows it, without where it comes from."""
    running, said = started(ANSWERING), []
    running.wait(30)
    httpx.get(f"{running.url}/fail")
    until(lambda: "it hurts" in running.log.read_text())
    running.follow(said.append)
    assert not said
    httpx.get(f"{running.url}/fail")
    until(lambda: said)
    httpx.get(f"{running.url}/fail")
    until(lambda: len(said) == 2)
    assert said == ["server 0: it hurts"] * 2


def test_a_server_that_ends_later(started):
    running = started(ANSWERING)
    running.wait(30)
    with contextlib.suppress(httpx.TransportError):
        httpx.get(f"{running.url}/end")
    with pytest.raises(EngineError, match=r"^server 0 ended with exit code 5: RuntimeError: asked to end \(log: /"):
        running.check_alive()


@pytest.mark.parametrize("code", [SILENT, DEAF])
def test_a_server_that_takes_too_long(started, monkeypatch, code):
    monkeypatch.setattr(process, "NEWS_SECONDS", 0.1)
    monkeypatch.setattr("jaxrft.rollout.server_side.jaxrft_watch.SECONDS_TO_END", 0.3)
    monkeypatch.setattr(process, "SECONDS_TO_END", 0.3)
    running, news = started(code), []
    until(lambda: running.log.read_text())
    with pytest.raises(EngineError, match=r"^server 0 did not answer within 0 s; last line of .*: loading weights; "):
        running.wait(0.4, news.append)
    assert news[0].startswith("server 0: starting for 0 s: loading weights")
    assert gone(running._process.pid)


def test_a_server_that_ends_at_once(started):
    words = "it does not want to"
    running = started(f"print('INFO 11-24 [a.py:1] hello')\nprint('jaxrft-refused: {words}')\nraise SystemExit(3)")
    with pytest.raises(ConfigError, match=rf"^rollout\.vllm: server 0 did not start: {words} \(log: .*/server\.log\)$"):
        running.wait(30)


def test_no_such_interpreter(started, tmp_path):
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.python: /no/python cannot be run \(No such file"):
        started("", python="/no/python")
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.python: .* cannot be run \(Permission denied\)"):
        started("", python=str(tmp_path))


def test_a_port_that_is_taken(started):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^rollout\.vllm\.port: {port} cannot be taken \(Address already in"):
            started("", port=port)


def test_a_python_without_vllm(started):
    """The one that runs these tests, with the launcher itself: one line, which says what to do."""
    running = started("", python=sys.executable)
    with pytest.raises(ConfigError) as error:
        running.wait(60)
    message = str(error.value)
    assert message.startswith(f"rollout.vllm: server 0 did not start: {sys.executable} has no vLLM: install it there")
    assert "\n" not in message
    assert len(running.log.read_text().splitlines()) == 1


PYDANTIC = """\
INFO 11-24 19:27:21 [importing.py:44] Triton is installed but 0 active driver(s) found.
(APIServer pid=31) INFO 11-24 19:27:24 [api_server.py:83] vLLM API server version 0.24.0
(APIServer pid=31) Traceback (most recent call last):
(APIServer pid=31)   File "/venv/lib/python3.12/site-packages/vllm/config/model.py", line 451, in __post_init__
(APIServer pid=31) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=31)   Value error, Model architectures ['X'] are not supported for now. Supported architectures: {} \
[type=value_error, input_value=ArgsKwargs((), {'model': ...}), input_type=ArgsKwargs]
(APIServer pid=31)     For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""
CACHE = """\
(EngineCore pid=12) \x1b[0;36mINFO 11-24 19:27:20\x1b[0;0m [gpu_worker.py:298] Available KV cache memory: -0.4 GiB
(EngineCore pid=12) ERROR 11-24 19:27:25 [core.py:12] EngineCore failed to start.
(EngineCore pid=12) ERROR 11-24 19:27:25 [core.py:12] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-24 19:27:25 [core.py:12]   File "/venv/vllm/v1/core/kv_cache_utils.py", line 671
(EngineCore pid=12) ERROR 11-24 19:27:25 [core.py:12] ValueError: No available memory for the cache blocks. Try more.
(APIServer pid=31) Traceback (most recent call last):
(APIServer pid=31) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
MEMORY = """\
(EngineCore_DP0 pid=12) ERROR 11-24 19:27:25 [core.py:12] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
(APIServer pid=31) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
ARGUMENTS = """\
usage: api_server.py [-h]
api_server.py: error: unrecognized arguments: --no-such
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (PYDANTIC, "Model architectures ['X'] are not supported for now. Supported architectures: {}"),
        (CACHE, "ValueError: No available memory for the cache blocks. Try more."),
        (MEMORY, "OutOfMemoryError: CUDA out of memory. Tried 2 GiB"),
        (ARGUMENTS, "api_server.py: error: unrecognized arguments: --no-such"),
        ("a\njaxrft-refused: vLLM 0.1 is too old\nRuntimeError: b\n", "vLLM 0.1 is too old"),
        (CACHE.splitlines()[-1], "(APIServer pid=31) RuntimeError: Engine core"),
        ("", "it printed nothing"),
        (" \n\n", "it printed nothing"),
    ],
)
def test_reasons(log, reason):
    found = reason_in(log)
    assert found.startswith(reason.removeprefix("(APIServer pid=31) "))
    assert "\n" not in found
    assert "[type=" not in found
    assert len(found) <= 400


# ------------------------------------------------------------------ what is said to a server that runs


class Wire:
    """Answers as a vLLM server with our extensions; ``answers`` maps paths to other answers."""

    def __init__(self):
        self.asked, self.answers, self.status = [], {}, "empty"

    def __call__(self, request):
        path, body = request.url.path, json.loads(request.content or b"null")
        note = f"{path} {body['method'].removeprefix('jaxrft_')}" if path == "/collective_rpc" else path
        if path == "/jaxrft/state" and request.method == "POST":
            note += f" {json.dumps(body)}"
        self.asked.append(f"{note}?{request.url.query.decode()}" if request.url.query else note)
        self.last = request
        if path in self.answers:
            answer = self.answers[path]
            if isinstance(answer, Exception):
                raise answer
            return answer
        if path == "/jaxrft/state":
            return httpx.Response(200, json={"protocol": 1, "vllm": "0.24.0", "status": "empty", "version": None})
        if path == "/collective_rpc":
            return httpx.Response(200, json={"results": [worker()]})
        if path == "/openapi.json":
            return httpx.Response(200, json={"paths": {}})
        return httpx.Response(200)


@pytest.fixture
def wire(monkeypatch):
    made, client = Wire(), httpx.Client
    monkeypatch.setattr(
        server.httpx, "Client", lambda **options: client(**options, transport=httpx.MockTransport(made))
    )
    return made


def connected(key="secret"):
    return Server("http://host:1/", key, "server 0", 7.0)


def test_a_transfer_step_by_step(wire):
    """Nothing is generated from before the first byte until all is in its place."""
    talked = connected()
    assert (talked.vllm_version, talked.workers[0]["device"], talked.url) == ("0.24.0", "cpu", "http://host:1")
    del wire.asked[:]
    talked.begin()
    talked.load({"slot": 1})
    assert json.loads(json.loads(wire.last.content)["args"][0]) == {"slot": 1}
    talked.finish(3, 8)
    assert wire.last.headers["authorization"] == "Bearer secret"
    assert wire.asked == [
        '/jaxrft/state {"status": "loading"}',
        "/pause?mode=wait",
        "/collective_rpc begin",
        "/collective_rpc load",
        "/collective_rpc finish",
        "/reset_prefix_cache",
        "/resume",
        '/jaxrft/state {"status": "ready", "version": 8}',
    ]
    del wire.asked[:]
    talked.abort()
    assert wire.asked == ["/pause?mode=abort", "/resume"]


def test_sleep_step_by_step(wire):
    """Requests are let in when weights and caches are both there, and not before."""
    talked = connected()
    talked.finish(3, 7)
    opened = ["/reset_prefix_cache", "/resume", '/jaxrft/state {"status": "ready", "version": 8}']
    del wire.asked[:]
    talked.sleep(2)
    talked.wake("weights")
    talked.finish(3, 8)
    before = ['/jaxrft/state {"status": "asleep"}', "/sleep?level=2", "/wake_up?tags=weights"]
    assert wire.asked == [*before, "/collective_rpc finish"]
    del wire.asked[:]
    talked.wake("kv_cache")
    assert wire.asked == ["/wake_up?tags=kv_cache", *opened]
    # At level 1 the weights stay.
    del wire.asked[:]
    talked.sleep(1)
    talked.wake("weights")
    talked.wake("kv_cache")
    assert wire.asked[-4:] == ["/wake_up?tags=kv_cache", *opened]
    # At level 2 they do not: nothing is let in without others.
    talked.sleep(2)
    talked.wake("weights")
    talked.wake("kv_cache")
    assert wire.asked[-1] == "/wake_up?tags=kv_cache"


def test_a_server_that_stamps_versions_itself(wire):
    wire.answers["/openapi.json"] = httpx.Response(200, json={"paths": {"/update_weight_version": {}}})
    talked = connected()
    talked.finish(3, 8)
    assert json.loads(wire.last.content) == {"status": "ready", "version": 8}
    assert wire.asked[-4:-1] == ["/update_weight_version", "/reset_prefix_cache", "/resume"]


def test_generation_over_the_wire(wire):
    headers = {"x-jaxrft-version-before": "3", "x-jaxrft-version": "4"}
    wire.answers["/inference/v1/generate"] = httpx.Response(200, json={"choices": [1]}, headers=headers)
    talked = connected()
    assert talked.generate({"n": 1}) == {"choices": [1], "versions": ["3", "4"]}
    assert wire.last.extensions["timeout"]["read"] == 7.0
    wire.answers["/inference/v1/generate"] = httpx.Response(400, json={"error": {"message": "too long"}})
    with pytest.raises(EngineError, match=r"^server 0: refused a request \(400\): too long$"):
        talked.generate({})
    wire.answers["/inference/v1/generate"] = httpx.Response(503, json={"error": "refused: no weights have come yet"})
    with pytest.raises(EngineError, match=r"\(503\): refused: no weights have come yet$"):
        talked.generate({})
    wire.answers["/inference/v1/generate"] = httpx.ConnectError("refused")
    with pytest.raises(httpx.ConnectError):
        talked.generate({})


def test_a_worker_that_fails(wire):
    """One of several is enough."""
    talked = connected()
    wire.answers["/collective_rpc"] = httpx.Response(200, json={"results": [{}, {"error": "KeyError: 'x'"}]})
    with pytest.raises(EngineError, match=r"^server 0: load: KeyError: 'x'$"):
        talked.load({})
    talked.release("trainer")
    wire.answers["/pause"] = httpx.Response(500, text="Internal Server Error")
    with pytest.raises(EngineError, match=r"^server 0: /pause failed \(500\): Internal Server Error$"):
        talked.begin()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (httpx.Response(401, json={"error": "Unauthorized: wrong key"}), ConfigError, "asks for another API key"),
        (httpx.Response(404, json={"detail": "Not Found"}), ConfigError, "not a server that takes our weights"),
        (httpx.Response(200, json={"protocol": 2, "vllm": "9"}), ConfigError, "not a server .* of this version"),
        (httpx.Response(200, text="<html>"), ConfigError, "not a server that takes our weights"),
        (httpx.ConnectError("refused"), EngineError, "no answer from http://host:1 .ConnectError.: does it still run"),
    ],
)
def test_what_is_no_server_of_ours(wire, answer, error, message):
    wire.answers["/jaxrft/state"] = answer
    with pytest.raises(error, match=f"^server 0: {message}"):
        connected()


@pytest.mark.parametrize(
    ("server", "servers", "workers", "expected"),
    [
        (0, 1, 1, None),
        (0, 2, 1, "3,4"),
        (1, 2, 1, "5,6"),
        (0, 1, 2, "3,4|5,6"),
        (1, 2, 2, "5|6"),
        (4, 5, 1, "3"),
    ],
)
def test_several_servers_on_a_cpu_have_cores_of_their_own(monkeypatch, server, servers, workers, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {6, 4, 3, 5})
    assert cpu_cores(server, servers, workers) == expected
