"""The tables and plots of the documentation are those of the reports; and how they are made from them."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from tests.conftest import ROOT


def test_page_is_what_the_reports_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def page(tmp_path):
    """A page with one section, and a folder with one report of it."""
    results = tmp_path / "results"
    results.mkdir()
    found = ROOT / "benchmarks/results/rollout_cpu.json"
    (results / found.name).write_text(found.read_text())
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- results:rollout -->\nold\n<!-- /results:rollout -->\nafter\n")
    return ["--results", str(results), "--page", str(path)], path


def test_check_sees_a_change(page, capsys):
    options, path = page
    assert report.main([*options, "--check"]) == 1
    assert "page.md is not what the reports give" in capsys.readouterr().out
    assert "old" in path.read_text()
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| 64 | 64 + 64 |" in text
    changed = json.loads((path.parent / "results/rollout_cpu.json").read_text())
    changed["cases"][0]["jaxrft"]["tokens_per_second"] += 100
    (path.parent / "results/rollout_cpu.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert report.main([*options, "--check"]) == 1
    # The plot says what it was drawn from.
    assert "benchmark-rollout-cpu.png is not" in capsys.readouterr().out


def test_section_without_a_report_says_so(page):
    options, path = page
    path.write_text("<!-- results:loading -->\n<!-- /results:loading -->\n")
    assert report.main(options) == 0
    assert "Not measured yet" in path.read_text()


def test_what_has_no_report_is_named(page):
    options, path = page
    path.write_text("<!-- results:missing -->\n<!-- /results:missing -->\n")
    assert report.main(options) == 0
    gpu, cpu = (line for line in path.read_text().splitlines() if line.startswith("Not measured yet"))
    assert "a GPU: `train_step_1.5B_8192`, `rollout_1.5B_64_256`, " in gpu
    assert "a CPU: `grpo_step`, " in cpu
    # The one that there is.
    assert "`rollout_groups`" in cpu
    assert "`rollout`" not in cpu


@pytest.mark.parametrize("section", sorted(report.SECTIONS))
def test_plots_of_some_cases_and_of_failed_ones(section, tmp_path):
    found = report.reports_of(section, ROOT / "benchmarks/results")
    assert found
    made = report.read(found[0])
    whole = made["cases"]
    failed = whole[0] | {"error": "no memory", "kernels": {}}
    failed |= {"sides": {name: {"error": "no memory"} for name in whole[0].get("sides", {})}}
    # Of these a case that fails ends the benchmark.
    fails = section not in ("rollout", "reward_overlap")
    for cases in (whole[:1], [*whole, failed] if fails else whole):
        made["cases"] = cases
        report.draw(report.SECTIONS[section][1], made, tmp_path / "plot.png", "digest")
        assert report.digest_of(tmp_path / "plot.png") == "digest"


def test_unknown_section_is_refused(page):
    options, path = page
    path.write_text("<!-- results:nothing -->\n<!-- /results:nothing -->\n")
    with pytest.raises(SystemExit, match="no benchmark has results:nothing"):
        report.main(options)


def test_gpu_reports_of_a_section_are_all_shown(page):
    options, path = page
    results = path.parent / "results"
    case = {"settings": {"model": "1.5B", "length": 2048, "dtype": "bfloat16", "remat": "none", "packed": True}}
    case |= {"remat": "none", "tokens_per_second": 1234.0, "seconds": 2.0, "utilisation": 0.5}
    case |= {"memory": {"peak_bytes": 2**30, "source": "device"}, "lower_seconds": 1.0, "compile_seconds": 2.0}
    failed = {"settings": case["settings"], "error": "Out: of | memory\nmore"}
    made = {"device": {"platform": "gpu", "kind": "NVIDIA H200", "count": 1}, "versions": {"jax": "0.10.2"}}
    for length in (2048, 8192):
        report_of = made | {"command": f"python some {length}", "cases": [case, failed]}
        (results / f"train_step_1.5B_{length}_gpu.json").write_text(json.dumps(report_of))
    path.write_text("<!-- results:train_step -->\n<!-- /results:train_step -->\n")
    assert report.main(options) == 0
    text = path.read_text()
    assert text.count("Measured on 1 x NVIDIA H200") == 2
    assert "| 1.5B | 2048 | bfloat16 | `none` | packed | 1,234 | 2.00 | 0.500 | 1.00 | 3.00 | - | - |" in text
    assert "failed: Out: of / memory |" in text
    assert (path.parent / "images/benchmark-train-step-1.5B-8192-gpu.png").exists()


def test_reports_of_parts_stand_behind_the_whole(tmp_path):
    names = ["a_cpu.json", "a_vllm_cpu.json", "a_gpu.json", "a_1.5B_gpu.json"]
    for name in [*names, "b_cpu.json"]:
        (tmp_path / name).write_text("{}")
    assert [path.name for path in report.reports_of("a", tmp_path)] == names
