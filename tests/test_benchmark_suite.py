"""The command that runs the benchmarks of a suite."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from benchmarks import run
from tests.conftest import ROOT


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_every_entry_is_a_command_that_its_script_takes(suite, capsys):
    assert run.main(["--suite", suite, "--list", "--trl", "/some/python", "--vllm", "/other/python"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = run.entries(suite)
    assert len(lines) == len({entry.name for entry in entries}) == len(entries)
    (step,) = (line for line in lines if line.startswith("grpo_step: "))
    assert "--trl /some/python" in step
    assert "--tunix" not in step
    for entry, line in zip(entries, lines):
        assert line.startswith(f"{entry.name}: {sys.executable}")
        script = importlib.import_module(entry.script)
        words = line.partition(f"{entry.script}.py ")[2].split()
        # Raises where an option is unknown.
        script.parse_arguments(words)


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_every_report_is_an_entrys(suite):
    """By name: ``--only`` measures again what the documentation shows."""
    names = {path.name.removesuffix(f"_{suite}.json") for path in (ROOT / "benchmarks/results").glob(f"*_{suite}.json")}
    assert names - {"suite"} <= {entry.name for entry in run.entries(suite)}


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A suite of three scripts in a folder: one that writes its report, one that fails, one that hangs."""
    writes = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{}')"
    for name, code in {"good": writes, "bad": "raise ValueError('why')", "slow": "import time; time.sleep(60)"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    found = tuple(run.Entry(name, name, "--some option") for name in ("bad", "good", "slow"))
    monkeypatch.setattr(run, "entries", lambda suite: found)

    def call(*options):
        output = tmp_path / "results"
        code = run.main(["--suite", "cpu", "--output-dir", str(output), "--logs", str(tmp_path / "logs"), *options])
        record = output / "suite_cpu.json"
        return code, json.loads(record.read_text()) if record.exists() else {}

    return call


def test_failure_does_not_stop_the_others(suite, capsys):
    code, record = suite("--only", "bad", "good")
    assert code == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert "FAILED with 1: ValueError: why" in bad
    assert good.startswith("good: done in ")
    assert record["good"]["exit_code"] == 0
    assert record["good"]["command"] == "python benchmarks/good.py --some option --output good_cpu.json"
    assert suite("--only", "good")[0] == 0
    # What ran before keeps its line.
    assert suite("--only", "good")[1].keys() == {"bad", "good"}


def test_one_that_takes_too_long_is_ended(suite, capsys):
    code, record = suite("--only", "slow", "--timeout", "0.5")
    assert code == 1
    assert record["slow"]["exit_code"] == 124
    assert record["slow"]["seconds"] < 30


def test_nothing_begins_after_the_budget(suite, capsys):
    code, record = suite("--budget", "0")
    assert code == 0
    assert record == {}
    assert capsys.readouterr().out.count("left out") == 3


def test_what_has_a_report_can_be_left_out(suite, capsys):
    assert suite("--only", "good", "--missing")[0] == 0
    assert suite("--only", "good", "--missing")[0] == 0
    assert capsys.readouterr().out.count("good: done") == 1


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "cpu", "--only", "nothing"])
    assert "the suite cpu has no nothing; it has grpo_step" in capsys.readouterr().err
