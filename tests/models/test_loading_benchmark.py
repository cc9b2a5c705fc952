"""The benchmark of loading: its report, and that what it counts is there."""

import importlib
import json
import os

import jax
import pytest

from jaxrft import models
from tests.conftest import ROOT

MIB = 2**20


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_report_is_complete_and_consistent(benchmark, tmp_path, capsys):
    pytest.importorskip("torch")
    output, folder = tmp_path / "reports" / "report.json", tmp_path / "checkpoints"
    folder.mkdir()
    command = "--gib 0.002 --repeats 2 --in-process"
    benchmark("loading").main([*command.split(), "--folder", str(folder), "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["command"] == f"python benchmarks/loading.py {command} --folder checkpoints --output report.json"
    assert {"date", "device", "host", "versions", "options", "checkpoint", "cases"} <= report.keys()
    assert report["versions"]["jax"] == jax.__version__
    assert report["checkpoint"]["bytes"] == pytest.approx(0.002 * 2**30, rel=0.1)
    assert report["checkpoint"]["files"] > 1
    # The checkpoint is gone.
    assert not list(folder.iterdir())
    cases = {(case["side"], case["cache"]): case for case in report["cases"]}
    sides = ("raw 1", "raw 4", "raw kept", "jaxrft", "transformers")
    assert list(cases) == [(side, cache) for cache in ("cold", "warm") for side in sides]
    for (side, cache), case in cases.items():
        assert len(case["all_seconds"]) == 2
        assert [case["first_seconds"], case["seconds"]] == case["all_seconds"]
        assert case["gb_per_second"] * case["seconds"] == pytest.approx(report["checkpoint"]["bytes"] / 1e9)
        if not side.startswith("raw"):
            raw = max(cases[name, cache]["gb_per_second"] for name in ("raw 1", "raw 4"))
            assert case["of_raw"] == pytest.approx(case["gb_per_second"] / raw)
            assert case["of_kept"] == pytest.approx(case["gb_per_second"] / cases["raw kept", cache]["gb_per_second"])
            # From bfloat16 to float32.
            assert case["final_bytes"] == 2 * report["checkpoint"]["bytes"]
            assert "above_final_bytes" in case
    assert cases["raw kept", "warm"]["fresh_bytes"] >= 2 * report["checkpoint"]["bytes"]
    assert "above it GiB" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("ratio", [0.5, 1, 2])
def test_the_plain_read_that_keeps_what_it_read(benchmark, tmp_path, ratio, monkeypatch):
    """Every byte is read once, and as much memory is written as parameters take."""
    sides = benchmark("loading_sides")
    monkeypatch.setattr(sides, "BLOCK_BYTES", 1000)
    contents = [bytes(range(256)) * 10, bytes(range(200, 10, -1)) * 5, b""]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    blocks, keep = {}, sides._keep

    def kept(file, start, size, ratio):
        blocks[os.fstat(file).st_size, start] = memory = keep(file, start, size, ratio)
        return memory

    monkeypatch.setattr(sides, "_keep", kept)
    assert sides.read_kept(tmp_path, 4, ratio)["seconds"] > 0
    assert set(blocks) == {(2560, 0), (2560, 1000), (2560, 2000), (950, 0)}
    for (size, start), memory in blocks.items():
        read = contents[size == 950][start : start + 1000]
        assert len(memory) == int(len(read) * ratio)
        # Of what fits no more than once, the last part lies over the first.
        assert memory[:] == {0.5: read[len(memory) :][: len(memory)], 1: read, 2: read + bytes(len(read))}[ratio]


def test_the_checkpoint_is_loaded_as_it_is_described(benchmark, tmp_path):
    made = benchmark("loading_sides").make_checkpoint(tmp_path, 3 * MIB, "float32")
    spec = models.spec_of(tmp_path)
    assert spec.num_layers == made["config"]["num_hidden_layers"]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(models.load(tmp_path))) == made["bytes"]
    assert benchmark("loading_sides").fields_of(int(14.2 * 2**30), 2) == benchmark("step_shapes").hf_config("7B", 1024)
    tied = benchmark("loading_sides").fields_of(2**30, 2)
    assert (tied["hidden_size"], tied["num_hidden_layers"]) == (896, 27)


def test_a_side_that_fails_is_written_with_its_error(benchmark, monkeypatch, tmp_path):
    def fails(*arguments):
        raise MemoryError("none left")

    monkeypatch.setattr(benchmark("loading_sides"), "load_ours", fails)
    report = benchmark("loading").main(
        ["--gib", "0.001", "--repeats", "1", "--in-process", "--no-peer", "--folder", str(tmp_path)]
    )
    errors = {case["side"]: case.get("error") for case in report["cases"]}
    assert errors == {"raw 1": None, "raw 4": None, "raw kept": None, "jaxrft": "MemoryError: none left"}
