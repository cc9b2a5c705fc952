"""The benchmark of weight transfers: its report, and that what it counts has come."""

from __future__ import annotations

import argparse
import importlib
import json
import os

import jax
import pytest

from tests.conftest import ROOT

PYTHON = os.environ.get("JAXRFT_TEST_VLLM")


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def check_speeds(case, repeats):
    assert len(case["update_seconds"]) == len(case["copy"]["seconds"]) == repeats
    assert case["gb_per_second"] * case["seconds"] == pytest.approx(case["bytes"] / 1e9)
    assert case["seconds_per_3_gb"] / case["seconds"] == pytest.approx(3e9 / case["bytes"])
    assert case["speed_over_copy"] == pytest.approx(case["gb_per_second"] / case["copy"]["gb_per_second"])
    assert {"begin", "pack", "put", "load", "finish"} <= case["parts"].keys()
    assert all(seconds > 0 for seconds in case["parts"].values())


def test_report_is_complete_and_all_bytes_came(benchmark, tmp_path, capsys):
    pytest.importorskip("torch")
    output = tmp_path / "folder" / "report.json"
    command = "--sizes tiny --transport shared_memory --dtype bfloat16 --bucket-mib 1 --repeats 2 --checksum"
    benchmark("weight_transfer").main([*command.split(), "--output", str(output)])
    report = json.loads(output.read_text())
    # Where the report lies is nobody's business.
    assert report["command"] == f"python benchmarks/weight_transfer.py {command} --output report.json"
    assert {"date", "device", "host", "versions", "options", "goal", "cases"} <= report.keys()
    assert report["versions"]["jax"] == jax.__version__
    assert report["options"]["receiver"] == "PYTHON"
    assert report["goal"]["reached"] == {"stand-in": None}
    [case] = report["cases"]
    assert (case["receiver"], case["size"], case["dtype"]) == ("stand-in", "tiny", "bfloat16")
    assert case["transport"] == "shared_memory"
    # Of 2 layers, tied: 64 channels, 4 heads and 2 key heads of 16, 128 in between, 256 tokens; and biases and norms.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + (64 + 32 + 32) + 2 * 64
    assert case["received_bytes"] == case["bytes"] == case["copy"]["bytes"] == 2 * (2 * layer + 256 * 64 + 64)
    check_speeds(case, repeats=2)
    assert 0 < case["parts"]["receive"] <= case["parts"]["load"]
    printed = capsys.readouterr().out.splitlines()
    assert "s per 3 GB" in printed[0]
    assert "shared_memory" in printed[1]
    assert printed[2] == "goal: 3 GB of bfloat16 in below 0.1 s on one H200: stand-in not measured here"


def test_a_case_that_fails_is_written_with_its_error(benchmark, capsys):
    pytest.importorskip("torch")
    report = benchmark("weight_transfer").main(["--sizes", "tiny", "--transport", "cuda_ipc", "--repeats", "1"])
    [case] = report["cases"]
    assert "ConfigError" in case["error"]
    assert "cuda_ipc needs" in case["error"]
    assert "failed: ConfigError" in capsys.readouterr().out.splitlines()[1]


def test_a_bucket_that_changed_on_its_way_is_found(benchmark, monkeypatch):
    pytest.importorskip("torch")
    from jaxrft.rollout.transfer.shared_memory import SharedMemory

    put = SharedMemory.put

    def spoil(self, slot, packed):
        put(self, slot, packed)
        self.bytes_of(slot, packed.nbytes)[-1] ^= 1

    monkeypatch.setattr(SharedMemory, "put", spoil)
    [case] = benchmark("weight_transfer").main(["--sizes", "tiny", "--repeats", "1"])["cases"]
    assert "what came is not what was sent" in case["error"]


@pytest.mark.parametrize(
    ("receiver", "size", "seconds", "dtype", "device", "found"),
    [
        ("vllm", 3.1e9, 0.09, "bfloat16", "NVIDIA H200", True),
        ("vllm", 3.1e9, 0.11, "bfloat16", "NVIDIA H200", False),
        # Another device, another type, and far too little to tell.
        ("vllm", 3.1e9, 0.09, "bfloat16", "NVIDIA H100", None),
        ("stand-in", 3.1e9, 0.09, "float32", "NVIDIA H200", None),
        ("stand-in", 1e9, 0.09, "bfloat16", "NVIDIA H200", None),
    ],
)
def test_the_goal_is_judged_by_what_was_measured(benchmark, receiver, size, seconds, dtype, device, found):
    case = {"receiver": receiver, "dtype": dtype, "bytes": size, "seconds_per_3_gb": seconds}
    far = {"receiver": receiver, "dtype": dtype, "bytes": 1.5e10, "seconds_per_3_gb": 0.1}
    cases = [case] if found is None else [far, case]
    assert benchmark("weight_transfer").reached(cases, device) == {receiver: found}


def test_commands_show_no_folders_of_this_machine(benchmark):
    machine = benchmark("machine")
    argv = ["--vllm", "/somebody/vllm/bin/python3.11", "--model=/data/a model", "--output", "results/a.json"]
    line = machine.command_line("rollout.py", argv)
    assert line == "python benchmarks/rollout.py --vllm PYTHON '--model=a model' --output results/a.json"
    options = argparse.Namespace(vllm=argv[1], repeats=3, sizes=["a"], model="Qwen/Qwen2.5-0.5B", output="x")
    kept = {"vllm": "PYTHON", "repeats": 3, "sizes": ["a"], "model": "Qwen/Qwen2.5-0.5B"}
    assert machine.options_of(options, without=("output",)) == kept


@pytest.mark.soak
@pytest.mark.skipif(PYTHON is None, reason="JAXRFT_TEST_VLLM names no Python that has vLLM")
@pytest.mark.timeout(1200)
def test_updates_of_a_real_server(benchmark):
    command = ["--sizes", "small", "--repeats", "2", "--bucket-mib", "4", "--no-stand-in", "--vllm", PYTHON]
    report = benchmark("weight_transfer").main(command)
    [case] = report["cases"]
    assert case.get("error") is None
    assert case["receiver"] == "vllm"
    assert case["vllm"]
    assert case["buckets"] > 1
    check_speeds(case, repeats=2)
