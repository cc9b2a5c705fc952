"""What keeps a benchmark's comparison one of like with like."""

from __future__ import annotations

import importlib
import json
import subprocess
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_torch_on_a_cpu_is_not_compared_with_a_gpu(benchmark, monkeypatch):
    torch = pytest.importorskip("torch")
    device = benchmark("torch_device").torch_device
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device("cpu") == "cpu"
        if there:
            assert device("gpu") == "cuda"
        else:
            with pytest.raises(RuntimeError, match="sees no GPU, where jaxrft has one: install it for CUDA, or leave"):
                device("gpu")


def test_a_report_says_which_code_ran(benchmark, tmp_path, monkeypatch):
    machine, output = benchmark("machine"), tmp_path / "report.json"
    machine.make_report("some.py", [], {}, SimpleNamespace(output=output))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(output.read_text())
    assert report["commit"] == (head.stdout.strip() or None)
    # Without git the fields are there, and say nothing.
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.make_report("some.py", [], {}, SimpleNamespace(output=output))
    report = json.loads(output.read_text())
    assert report["commit"] is report["changed_files"] is None


def test_sides_share_a_gpu(benchmark):
    """Each holds its memory while the others work: together no more than there is."""
    settings_of = benchmark("grpo_run").settings_of
    options = SimpleNamespace(memory_fraction=None, trl_param_dtype="float32", vllm=None)
    alone = settings_of(["jaxrft"], options, "gpu")
    assert alone["jaxrft"] == {"memory_fraction": None, "vllm": None}
    assert settings_of(["jaxrft", "trl"], options, "gpu")["jaxrft"]["memory_fraction"] == 0.5
    assert settings_of(["jaxrft", "trl"], options, "cpu")["jaxrft"]["memory_fraction"] is None
    options.vllm = "/some/python"
    both = settings_of(["jaxrft", "jaxrft_vllm"], options, "gpu")
    assert both["jaxrft"] == {"memory_fraction": 0.25, "vllm": None}
    assert both["jaxrft_vllm"] == {"memory_fraction": 0.25, "vllm": "/some/python"}
    assert both["trl"]["platform"] == both["tunix"]["platform"] == "gpu"


def test_several_profiles_are_not_taken_for_one(benchmark, tmp_path):
    kernel_times = benchmark("kernel_times")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "host.xplane.pb").write_bytes(b"")
    with pytest.raises(ValueError, match="holds several profiles; name the folder of one: a, b"):
        kernel_times.read(tmp_path)
