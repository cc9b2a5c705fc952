"""What the benchmarks read from a GPU's profile and from a program compiled for one: on made-up ones."""

from __future__ import annotations

import importlib

import pytest

from tests.conftest import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_kernels_are_summed_by_name_and_gaps_are_idle(benchmark):
    kernels = benchmark("kernel_times")
    events = [
        kernels.Event("fusion_12", "layers/0/mlp", 1.0, 0.5),
        kernels.Event("gemm", "layers/1/mlp", 1.25, 0.5),  # beside the first, on another stream
        kernels.Event("fusion_7_1", "layers/1/mlp", 3.0, 1.0),
    ]
    found = kernels.summarise(events)
    assert [(line["name"], line["count"]) for line in found["lines"]] == [("fusion", 2), ("gemm", 1)]
    assert found["lines"][0]["seconds"] == pytest.approx(1.5)
    assert found["busy_seconds"] == pytest.approx(1.75)
    assert found["idle_seconds"] == pytest.approx(1.25)
    assert [line["name"] for line in kernels.summarise(events, "operation")["lines"]] == ["layers/*/mlp"]
    many = [kernels.Event(f"kernel{number}x", "", number, 0.5) for number in range(kernels.LINES + 3)]
    assert kernels.summarise(many)["lines"][-1] == {"name": "others", "seconds": pytest.approx(1.5), "count": 3}


def test_a_folder_without_a_profile_is_an_error(benchmark, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no profile"):
        benchmark("kernel_times").read(tmp_path)


def test_a_profile_of_a_cpu_is_an_error(benchmark, tmp_path):
    import jax.numpy as jnp

    kernels = benchmark("kernel_times")
    with kernels.profile(tmp_path):
        jnp.arange(3).sum().block_until_ready()
    with pytest.raises(ValueError, match="has no GPU in it"):
        kernels.read(tmp_path)


PROGRAM = """
  %all-gather-start.1 = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}) all-gather-start(%x), channel_id=2
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce.3 = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  ROOT %reduce-scatter.9 = f32[5]{0} reduce-scatter(%c), dimensions={0}
  %while.4 = (s32[]) while(%t), backend_config={"known_trip_count":{"n":"14"}}
  %custom-call.2 = f32[2]{0} custom-call(%d), custom_call_target="__cublas$lt$matmul"
"""


def test_a_programs_collectives_are_counted_once(benchmark):
    found = benchmark("compile_gpu").read(PROGRAM)
    assert found == {
        "loops": {"14": 1},
        "collectives": {
            "all-gather bf16": {"count": 1, "bytes": 256},
            "all-reduce f32": {"count": 2, "bytes": 64},
            "reduce-scatter f32": {"count": 1, "bytes": 20},
        },
        "calls": {"__cublas$lt$matmul": 1},
    }
