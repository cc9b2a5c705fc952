"""The benchmark of a whole GRPO step: its report, and what it does with a side that fails."""

from __future__ import annotations

import importlib
import json
import os

import pytest

from tests.conftest import ROOT

TRL = os.environ.get("JAXRFT_TEST_TRL")
VLLM = os.environ.get("JAXRFT_TEST_VLLM")


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_report_is_complete_and_consistent(benchmark, tmp_path, capsys):
    output, ends = tmp_path / "report.json", tmp_path / "python3"
    # A peer that cannot start is written down with the end of its log, and the others go on.
    ends.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    ends.chmod(0o755)
    options = f"--cases tiny --repeats 2 --tunix {ends} --vllm {ends} --output {output}"
    benchmark("grpo_step").main(options.split())
    report = json.loads(output.read_text())
    command = "python benchmarks/grpo_step.py --cases tiny --repeats 2 --tunix PYTHON --vllm PYTHON"
    assert report["command"].startswith(command)
    assert {"date", "device", "host", "versions", "options"} <= set(report)
    assert str(tmp_path) not in output.read_text()
    [case] = report["cases"]
    assert case["sides"]["tunix"]["error"] == "tunix ended with 3: no such module"
    assert case["sides"]["jaxrft_vllm"]["error"] == "vLLM on a CPU takes heads of 32 channels at least, not 8"
    assert "speed_over_tunix" not in case
    ours = case["sides"]["jaxrft"]
    assert len(ours["step_seconds"]) == 2
    assert ours["fastest_seconds"] == min(ours["step_seconds"])
    assert ours["tokens_per_second"] * ours["seconds"] == pytest.approx(2 * 2 * 4)
    assert ours["phases"].keys() == {"rollout", "rewards", "training", "weights", "other"}
    assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"], rel=0.5)
    assert ours["compiled_in_timed_steps"] == 0
    [cold], [warm] = ours["first_step"]["cold"], ours["first_step"]["warm"]
    assert 0 < cold["ready"] < cold["seconds"]
    # The cache holds what takes long to compile.
    assert warm["compiled"]["programs"] < cold["compiled"]["programs"]
    table = capsys.readouterr().out.splitlines()
    assert "tokens/s" in table[0]
    assert "failed: tunix ended with 3" in table[2]


def test_completions_are_checked(benchmark):
    case_module = benchmark("grpo_case")
    case = case_module.CASES["tiny"]
    reward = case_module.make_reward(case)
    assert reward(completions=["t1 t2 t4 t30", "t1 t1 t1 t1"]) == [0.75, 0.0]
    with pytest.raises(ValueError, match="has 2 tokens, not 4"):
        reward(completions=["t1 t2"])
    prompts = case_module.make_prompts(case)
    assert {len(prompt.split()) for prompt in prompts} == {case.prompt_length}
    assert len(prompts) == case_module.rows(case)


@pytest.mark.skipif(TRL is None, reason="JAXRFT_TEST_TRL names no Python that has torch and TRL")
def test_trl_takes_its_turns(benchmark, tmp_path):
    report = benchmark("grpo_step").main(f"--cases tiny --repeats 1 --trl {TRL}".split())
    [case] = report["cases"]
    theirs = case["sides"]["trl"]
    assert theirs["versions"]["trl"]
    assert len(theirs["step_seconds"]) == 1
    assert theirs["first_step"]["cold"] == []
    ours = case["sides"]["jaxrft"]
    assert case["speed_over_trl"] == pytest.approx(theirs["seconds"] / ours["seconds"])


@pytest.mark.soak
@pytest.mark.skipif(VLLM is None, reason="JAXRFT_TEST_VLLM names no Python that has vLLM")
@pytest.mark.timeout(1200)
def test_rollouts_on_a_server_take_their_turns(benchmark):
    """The same step as with the native engine, with weights that go over to a server in it."""
    report = benchmark("grpo_step").main(f"--cases hidden256 --repeats 1 --vllm {VLLM}".split())
    assert "--vllm PYTHON" in report["command"]
    [case] = report["cases"]
    native, server = (case["sides"][name] for name in ("jaxrft", "jaxrft_vllm"))
    assert server["phases"].keys() == native["phases"].keys()
    assert server["phases"]["weights"] > native["phases"]["weights"]
    assert case["speed_over_jaxrft_vllm"] == pytest.approx(server["seconds"] / native["seconds"])
