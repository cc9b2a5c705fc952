"""The benchmark of attention: its report, and Triton's kernels with tiles of the command line."""

import importlib
import json

import pytest

from tests.conftest import ROOT


def test_report_has_a_line_for_each_of_the_tiles(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = tmp_path / "report.json"
    tiles = ["16x32x4x2:32x16x4x2:16x16x4x2", "32x16x4x3:16x16x4x2:32x16x8x3", "16x16"]
    command = "--lengths 40 --tokens 40 --masks packed --kernels dense triton --repeats 1 --no-peer --tiles"
    importlib.import_module("attention").main([*command.split(), *tiles, "--output", str(output)])
    cases = json.loads(output.read_text())["cases"]
    (found,) = (case["kernels"] for case in cases)
    assert list(found) == ["dense", "triton", *(f"triton {one}" for one in tiles)]
    assert "needs an NVIDIA GPU" in found["triton"]["error"]
    assert "TypeError" in found[f"triton {tiles[2]}"]["error"]
    for one in tiles[:2]:
        assert found[f"triton {one}"]["gap"] == pytest.approx(0.0, abs=1e-5)
        assert found[f"triton {one}"]["seconds"] > 0
    assert f"triton {tiles[0]}" in capsys.readouterr().out


def test_a_turn_of_several_calls_is_timed_as_one_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    attention = importlib.import_module("attention")
    ran, clock = [], iter([3.0, 11.0])
    monkeypatch.setattr(attention, "settle", lambda: None)
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    assert attention.timed(ran.append, 4) == 2.0
    assert ran == [4]
