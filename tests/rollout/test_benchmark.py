"""The benchmark's command runs and writes its report."""

from __future__ import annotations

import json
import os
import runpy
import sys

import pytest

from tests.conftest import ROOT

PYTHON = os.environ.get("JAXRFT_TEST_VLLM")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command and returns its report."""

    def call(options):
        report = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["rollout.py", *options.split(), "--output", str(report)])
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        runpy.run_path(str(ROOT / "benchmarks" / "rollout.py"), run_name="__main__")
        return json.loads(report.read_text())

    return call


def test_benchmark_writes_its_report(run) -> None:
    shape = "--hidden-size 16 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 16 --vocab-size 17"
    load = "--concurrency 4 --group 2 --prompt-length 3 --response-length 2 5 --repeats 1 --no-peer"
    written = run(f"{shape} {load}")
    assert written["command"].startswith("python benchmarks/rollout.py --hidden-size 16")
    assert written["versions"]["jax"]
    assert written["device"]["platform"] == "cpu"
    assert [case["response_length"] for case in written["cases"]] == [2, 5]
    for case in written["cases"]:
        ours, steps = case["jaxrft"], case["response_length"]
        assert ours["tokens_per_second"] > 0
        # Milliseconds of all steps but the first, whose seconds have the prefill.
        decoding = 1000 * (ours["seconds"] - ours["first_token_seconds"]) / (steps - 1)
        assert ours["ms_per_decode_step"] == pytest.approx(decoding, abs=0.1)
        floor = case["floor"]["ms_per_step"]
        assert case["decode_floor_ratio"]["jaxrft"] == pytest.approx(ours["ms_per_decode_step"] / floor, rel=1e-2)


@pytest.mark.soak
@pytest.mark.skipif(PYTHON is None, reason="JAXRFT_TEST_VLLM names no Python that has vLLM")
@pytest.mark.timeout(1200)
def test_vllm_generates_beside_the_others(run):
    shape = "--hidden-size 64 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 64 --vocab-size 128"
    # More prompt tokens than a server takes in one step, so that some prompts have to wait.
    load = "--concurrency 64 --prompt-length 50 --response-length 4 --repeats 2"
    written = run(f"{shape} {load} --vllm {PYTHON}")
    assert "--vllm PYTHON" in written["command"]
    assert written["options"]["vllm"] == "PYTHON"
    assert written["versions"]["vllm"]
    [case] = written["cases"]
    speeds = {side: case[side]["tokens_per_second"] for side in ("jaxrft", "vllm", "transformers")}
    for one, other in (("jaxrft", "vllm"), ("vllm", "transformers"), ("jaxrft", "transformers")):
        assert case[f"{one}_over_{other}"] == pytest.approx(speeds[one] / speeds[other], abs=1e-3)


def test_quantized_side_has_a_floor_of_its_own(run) -> None:
    shape = "--hidden-size 16 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 16 --vocab-size 17"
    written = run(f"{shape} --fp8 --concurrency 4 --prompt-length 3 --response-length 2 --repeats 1 --no-peer")
    [case] = written["cases"]
    kernels, projection = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 16, 16 * 17
    assert case["floor"]["bytes"]["weights"] == 4 * (kernels + projection)
    assert case["floor_fp8"]["bytes"] == case["floor"]["bytes"] | {"weights": kernels + 4 * projection}
    for side, floor in (("jaxrft", "floor"), ("jaxrft_fp8", "floor_fp8")):
        expected = case[side]["ms_per_step"] / case[floor]["ms_per_step"]
        assert case["floor_ratio"][side] == pytest.approx(expected, rel=1e-2)
    speeds = [case[side]["tokens_per_second"] for side in ("jaxrft_fp8", "jaxrft")]
    assert case["jaxrft_fp8_over_jaxrft"] == pytest.approx(speeds[0] / speeds[1], abs=1e-3)


def test_floor_is_that_of_the_bytes_read(run) -> None:
    shape = "--hidden-size 16 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 16 --vocab-size 17"
    written = run(f"{shape} --concurrency 4 --max-slots 2 --prompt-length 3 --response-length 2 --repeats 1 --no-peer")
    [case] = written["cases"]
    # Queries and outputs of 2 heads, keys and values of 1, three matrices of the feed-forward layer; the projection.
    weights = 4 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 16 + 16 * 17)
    # Two waves of two slots each; 4 completions with a key and a value of 8 channels for each of 4 tokens on average.
    assert case["floor"]["bytes"] == {"weights": 2 * weights, "cache": 4 * 4 * 2 * 8 * 4}
    floor = 1000 * sum(case["floor"]["bytes"].values()) / written["copy"]["bytes_per_second"]
    assert case["floor"]["ms_per_step"] == pytest.approx(floor)
    assert case["floor_ratio"]["jaxrft"] == pytest.approx(case["jaxrft"]["ms_per_step"] / floor, rel=1e-2)
