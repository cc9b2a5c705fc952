"""What the fields of rollout.vllm change in the servers that are started, and in the engine that talks to them."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest

from jaxrft.config import ConfigError
from jaxrft.config.parse import from_dict
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.vllm import launch
from tests.rollout.fake_server import FakeServer
from tests.rollout.tiny import random_model


def config_of(vllm, **rollout):
    values = {"rollout": {"engine": "vllm", "vllm": vllm, **rollout}, "max_prompt_length": 40}
    return from_dict(values | {"max_completion_length": 24})


def command_of(vllm, tmp_path, number=0, **rollout):
    return launch.server_options(config_of(vllm, **rollout), tmp_path, False, number).command()


def value_of(command, option):
    return command[command.index(option) + 1] if option in command else None


COMMAND = [  # Fields -> what of the command line differs from that of the defaults.
    ({"tensor_parallel": 2}, {"--tensor-parallel-size": "2"}),
    ({"port": 23456}, {"--port": "23456"}),
    ({"gpu_memory": 0.25}, {"--gpu-memory-utilization": "0.25"}),
]


@pytest.mark.parametrize(("values", "expected"), COMMAND)
def test_options_with_a_value(values, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "free_port", lambda: 11111)
    plain, changed = command_of({}, tmp_path), command_of(values, tmp_path)
    differing = {plain[i - 1]: after for i, (before, after) in enumerate(zip(plain, changed)) if before != after}
    assert differing == expected
    assert len(plain) == len(changed)
    assert (value_of(plain, "--max-model-len"), value_of(plain, "--max-num-seqs")) == ("64", "64")


FLAGS = [
    ({"sleep": True}, ["--enable-sleep-mode"]),
    ({"eager": True}, ["--enforce-eager"]),
    ({"arguments": ["--block-size", "32"]}, ["--block-size", "32"]),
]


@pytest.mark.parametrize(("values", "expected"), FLAGS)
def test_options_that_are_added(values, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "free_port", lambda: 11111)
    plain, changed = command_of({}, tmp_path), command_of(values, tmp_path)
    assert [word for word in changed if word not in plain] == expected


def test_python(tmp_path):
    """``python`` runs the server; ``port`` is the first one's."""
    command = command_of({"python": "/opt/vllm/bin/python", "port": 5000, "servers": 3}, tmp_path, number=2)
    assert command[0] == "/opt/vllm/bin/python"
    assert value_of(command, "--port") == "5002"


def test_environment(tmp_path, monkeypatch):
    """``cpu_cache_gib``; the trainer's own variables and the key stay where they belong."""
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "the trainer's")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    config = config_of({"cpu_cache_gib": 7})
    first, second = (launch.server_options(config, tmp_path, False, 0) for _ in range(2))
    environment = first.environment()
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert environment["SOMETHING_ELSE"] == "kept"
    assert "the trainer's" not in environment.values()
    assert environment["VLLM_API_KEY"] == first.key != second.key
    assert first.key not in " ".join(first.command()) + repr(first)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(launch.jax, "default_backend", lambda: "gpu")
    devices = [SimpleNamespace(local_hardware_id=number) for number in range(4)]
    monkeypatch.setattr(launch.jax, "local_devices", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def shown(vllm, tmp_path, number, **top):
    config = from_dict({"rollout": {"engine": "vllm", "vllm": vllm}, **top})
    options = launch.server_options(config, tmp_path, False, number)
    return options.environment().get("CUDA_VISIBLE_DEVICES")


def test_devices(tmp_path, four_gpus, monkeypatch):
    """``devices``, ``servers`` and ``tensor_parallel`` share out GPUs; shares of the trainer's own ones must fit."""
    apart = {"servers": 2, "tensor_parallel": 2, "devices": [7, 5, 6, 4]}
    assert [shown(apart, tmp_path, number) for number in (0, 1)] == ["7,5", "6,4"]
    monkeypatch.setattr(launch.jax, "default_backend", lambda: "cpu")
    assert shown({"devices": [3]}, tmp_path, 0) == "3"
    monkeypatch.setattr(launch.jax, "default_backend", lambda: "gpu")
    shared = {"parallel": {"memory_fraction": 0.4}}
    assert [shown({"servers": 2}, tmp_path, number, **shared) for number in (0, 1)] == ["0", "1"]
    with pytest.raises(ConfigError, match=r"^parallel\.memory_fraction: got None"):
        shown({"devices": [3]}, tmp_path, 0)
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.gpu_memory: 0\.6 .* and 0\.4 for the trainer"):
        shown({"gpu_memory": 0.6}, tmp_path, 0, **shared)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,3,2,1")
    assert shown({"tensor_parallel": 2}, tmp_path, 0, **shared) == "GPU-abc,3"
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.servers: 5 servers of 1 GPUs take more than the 4 that"):
        shown({"servers": 5}, tmp_path, 0, **shared)
    with pytest.raises(ConfigError, match=r"^parallel\.memory_fraction: got None, .* such as 0\.4 beside"):
        shown({}, tmp_path, 0)


class FakeProcess:
    """A server process that needs 5 seconds to start, by its own account."""

    made: ClassVar[list] = []

    def __init__(self, options, log, name):
        self.options, self.log, self.name, self.url = options, log, name, f"http://127.0.0.1:{options.port}"
        self.model = json.loads((options.model / "config.json").read_text())
        self.stopped = False
        self.made.append(self)

    def wait(self, seconds, say):
        if seconds < 5:
            raise EngineError(f"{self.name} did not answer within {seconds:.0f} s")

    def follow(self, say):
        say(f"{self.name}: followed")

    def stop(self):
        self.stopped = True


@pytest.fixture
def started(monkeypatch):
    """What an engine is made with: addresses of its servers, its own settings; processes are fakes."""
    FakeProcess.made = []
    seen = {}

    def connect(url, key, name, request_seconds):
        seen.setdefault("servers", []).append((url, key, name, request_seconds))
        return FakeServer(name, logprobs_mode="raw_logprobs")

    original = launch.VLLMEngine

    def engine(servers, model, tokenizer, **options):
        seen.update(options)
        return original(servers, model, tokenizer, **options)

    monkeypatch.setattr(launch, "ServerProcess", FakeProcess)
    monkeypatch.setattr(launch, "Server", connect)
    monkeypatch.setattr(launch, "VLLMEngine", engine)
    return seen


def test_servers(started, tmp_path):
    """``servers`` are started side by side, with the run's logs, and end with the engine."""
    said = []
    engine = launch.engine_from(config_of({"servers": 2, "port": 23400}), random_model(), None, tmp_path, said.append)
    processes = FakeProcess.made
    assert [(p.url, p.log) for p in processes] == [
        ("http://127.0.0.1:23400", tmp_path / "vllm-0.log"),
        ("http://127.0.0.1:23401", tmp_path / "vllm-1.log"),
    ]
    assert [key for _, key, _, _ in started["servers"]] == [p.options.key for p in processes]
    assert processes[0].model["dtype"] == "float32"
    assert processes[0].model["hidden_size"] == 16
    assert processes[0].options.model.exists()
    # Both start before either is waited for.
    assert ["starting" in line for line in said[:2]] == [True, True]
    engine.close()
    assert all(p.stopped for p in processes)
    assert not processes[0].options.model.exists(), "a temporary folder is left"


def test_startup_seconds(started, tmp_path):
    """Where one is not up after ``startup_seconds``, all are ended."""
    with pytest.raises(EngineError, match="vllm server 0 did not answer within 4 s"):
        launch.engine_from(config_of({"servers": 2, "startup_seconds": 4}), random_model(), None, tmp_path, [].append)
    assert [p.stopped for p in FakeProcess.made] == [True, True]
    assert not FakeProcess.made[0].options.model.exists()


def test_urls(started, tmp_path, monkeypatch):
    """``urls`` in place of processes, with a key from the environment; and what the engine itself is given."""
    monkeypatch.setenv("JAXRFT_VLLM_API_KEY", "theirs")
    vllm = {
        "urls": ["http://127.0.0.1:1", "https://other:2"],
        "request_seconds": 12.5,
        "transport": "shared_memory",
        "bucket_mib": 3,
        "checksum": True,
        "request_seeds": False,
    }
    launch.engine_from(config_of(vllm, max_slots=9), random_model(), None, tmp_path, [].append)
    assert not FakeProcess.made
    assert [(url, key, seconds) for url, key, _, seconds in started["servers"]] == [
        ("http://127.0.0.1:1", "theirs", 12.5),
        ("https://other:2", "theirs", 12.5),
    ]
    given = {
        name: started[name]
        for name in ("transport", "bucket_bytes", "checksum", "max_sequences", "max_length", "seeds")
    }
    with pytest.raises(ConfigError, match="reports raw_logprobs, .* start it with --logprobs-mode processed_logprobs"):
        launch.engine_from(config_of(vllm, first_token_temperature=0.5), random_model(), None, tmp_path, [].append)
    assert given == {
        "transport": "shared_memory", "bucket_bytes": 3 * 2**20, "checksum": True, "max_sequences": 9, "max_length": 64,
        "seeds": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("temperatures", "mode"),
    [((1.0, None), "raw_logprobs"), ((0.7, None), "processed_logprobs"), ((1.0, 2.0), "processed_logprobs")],
)
def test_mode_of_log_probabilities(temperatures, mode, tmp_path):
    temperature, first = temperatures
    values = {"rollout": {"engine": "vllm", "first_token_temperature": first}, "temperature": temperature}
    assert launch.server_options(from_dict(values), tmp_path, False, 0).logprobs_mode == mode


REFUSED = [
    ({"engine": "native", "vllm": {"servers": 2}}, r"rollout\.vllm: set with engine native"),
    *(
        ({"vllm": {"urls": ["http://a:1"], name: value}}, rf"rollout\.vllm\.{name}: set with urls")
        for name, value in {
            "python": "python3", "servers": 2, "tensor_parallel": 2, "devices": [0], "port": 8000, "gpu_memory": 0.4,
            "cpu_cache_gib": 2, "sleep": True, "eager": True, "arguments": ["--block-size", "32"],
        }.items()
    ),
    ({"vllm": {"urls": ["http://a:1", "http://a:1"]}}, r"rollout\.vllm\.urls: names a server twice"),
    ({"vllm": {"urls": ["127.0.0.1:8000"]}}, r"rollout\.vllm\.urls: got '127\.0\.0\.1:8000', takes addresses such as"),
    ({"vllm": {"arguments": ["--dtype", "half"]}}, r"rollout\.vllm\.arguments: --dtype follows from the run's other"),
    ({"vllm": {"arguments": ["--data_parallel_size=2"]}}, r"rollout\.vllm\.arguments: --data-parallel-size follows"),
    ({"vllm": {"devices": [0, 1]}}, r"rollout\.vllm\.devices: got \[0, 1\], takes 1 different numbers"),
    ({"vllm": {"devices": [1, 1], "servers": 2}}, r"rollout\.vllm\.devices: got \[1, 1\], takes 2 different numbers"),
    ({"vllm": {"devices": [-1]}}, r"rollout\.vllm\.devices: got \[-1\]"),
    ({"vllm": {"port": 65535, "servers": 2}}, r"rollout\.vllm\.port: got 65535"),
]  # fmt: skip


@pytest.mark.parametrize(("rollout", "message"), REFUSED)
def test_settings_that_are_refused(rollout, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict({"rollout": {"engine": "vllm", **rollout}})


TRUNCATION = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"rollout": {"min_tokens": 1}}]


@pytest.mark.parametrize("truncation", TRUNCATION)
def test_log_probabilities_that_would_be_missing(truncation):
    """Servers give them of what was drawn from; before temperature and truncation only those of temperature 1."""

    def values(**changes):
        rollout = {"engine": "vllm", **truncation.get("rollout", {}), **changes.pop("rollout", {})}
        return truncation | changes | {"rollout": rollout}

    for changes in ({"temperature": 0.9}, {"rollout": {"first_token_temperature": 2.0}}):
        with pytest.raises(ConfigError, match=r"^rollout\.missing_logprobs: vllm does not know"):
            from_dict(values(**changes))
        allowed = {"missing_logprobs": "trainer", **changes.get("rollout", {})}
        assert from_dict(values(**changes | {"rollout": allowed})).engine_lacks_logprobs
    assert not from_dict(values()).engine_lacks_logprobs
    assert not from_dict(values(temperature=0.9, rollout={"engine": "native"})).engine_lacks_logprobs
