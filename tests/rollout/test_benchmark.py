"""The benchmark's command runs and writes its report."""

from __future__ import annotations

import json
import runpy
import sys

from tests.conftest import ROOT


def test_benchmark_writes_its_report(tmp_path, monkeypatch) -> None:
    report = tmp_path / "report.json"
    shape = "--hidden-size 16 --layers 1 --heads 2 --kv-heads 1 --intermediate-size 16 --vocab-size 17"
    load = "--concurrency 4 --group 2 --prompt-length 3 --response-length 2 5 --repeats 1 --no-peer"
    monkeypatch.setattr(sys, "argv", ["rollout.py", *shape.split(), *load.split(), "--output", str(report)])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "rollout.py"), run_name="__main__")
    written = json.loads(report.read_text())
    assert written["command"].startswith("python benchmarks/rollout.py --hidden-size 16")
    assert written["versions"]["jax"]
    assert written["device"]["platform"] == "cpu"
    assert [case["response_length"] for case in written["cases"]] == [2, 5]
    for case in written["cases"]:
        assert case["jaxrft"]["tokens_per_second"] > 0
