"""The benchmark of rewards that overlap with generation: what it compares, and its report."""

import importlib
import json

import pytest

from jaxrft.training import overlap
from tests.conftest import ROOT
from tests.training.overlapping import wait_until


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reward_overlap")


def test_report(benchmark, tmp_path, capsys):
    output = tmp_path / "report.json"
    sizes = "--shape tiny --prompts 4 --group 2 --slots 4 --prompt-length 3 --response-length 8 --at-a-time 2"
    benchmark.main([*sizes.split(), "--latency", "0.02", "--repeats", "2", "--output", str(output)])
    (case,) = json.loads(output.read_text())["cases"]
    assert (case["latency"], case["completions"]) == (0.02, 8)
    assert list(case["sides"]) == ["rollout", "rewards", "one by one", "overlapped"]
    assert all(len(side["all_seconds"]) == 2 for side in case["sides"].values())
    # Eight answers, two at a time: no way but the first does without their time.
    assert all(case["sides"][name]["seconds"] >= 4 * 0.02 for name in ("rewards", "one by one", "overlapped"))
    assert "overlapped s" in capsys.readouterr().out


def test_what_is_hidden_is_a_share_of_what_can_be(benchmark):
    seconds = {"rollout": [3.0, 1.0, 2.0], "rewards": [1.0], "one by one": [3.0], "overlapped": [2.25, 2.25]}
    found = benchmark.compared(seconds)
    assert found["sides"]["rollout"]["seconds"] == 2.0
    assert found["hidden"] == 0.75


def test_every_way_scores_the_same_completions(benchmark, monkeypatch):
    """Each completion once; overlapped ones group by group, where each is waited for."""
    calls = []
    call, add = benchmark.Service.__call__, overlap.Overlap.add

    async def told(self, completions, **columns):
        calls.append(len(completions))
        return await call(self, completions, **columns)

    def waits(self, group, completions):
        before = sum(calls)
        add(self, group, completions)
        wait_until(lambda: sum(calls) > before)

    monkeypatch.setattr(benchmark.Service, "__call__", told)
    monkeypatch.setattr(overlap.Overlap, "add", waits)
    sizes = "--shape tiny --prompts 4 --group 2 --slots 2 --prompt-length 3 --response-length 8 --latency 0.001"
    benchmark.main([*sizes.split(), "--repeats", "1"])
    # Compilation, rollout, rewards, one by one, overlapped.
    assert calls == [8, 8, 8, 8, 2, 2, 2, 2]
