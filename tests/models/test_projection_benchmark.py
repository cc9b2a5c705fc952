"""The benchmark of the output projection: its report, and that its sides do the same work."""

import importlib
import json

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.jaxprs import product_flops


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_report_is_complete_and_consistent(benchmark, tmp_path, capsys):
    output = tmp_path / "folder" / "report.json"
    command = "--tokens 8 --hidden 16 --vocab 3000 --dtypes float32 --repeats 2 --ceiling-size 64"
    benchmark("projection").main([*command.split(), "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["command"] == f"python benchmarks/projection.py {command} --output report.json"
    assert {"date", "device", "host", "versions", "options", "goal", "matmul_ceilings", "cases"} <= report.keys()
    assert report["versions"]["jax"] == jax.__version__
    assert [(case["tied"], case["backward"]) for case in report["cases"]] == [
        (tied, backward) for tied in (True, False) for backward in (False, True)
    ]
    ceiling = report["matmul_ceilings"]["float32"]["flops_per_second"]
    for case in report["cases"]:
        assert case["flops"] == 2 * 8 * 16 * 3000 * (4 if case["backward"] else 1)
        assert list(case["sides"]) == ["jaxrft", "matmuls", "whole matmuls", "naive"]
        for side in case["sides"].values():
            assert len(side["all_seconds"]) == 2
            assert side["utilisation"] * side["seconds"] == pytest.approx(case["flops"] / ceiling)
            assert side["over_matmuls"] == pytest.approx(side["seconds"] / case["sides"]["matmuls"]["seconds"])
            assert side["temporary_bytes"] >= 0
            assert (side["result_bytes"] > 4 * 16 * 3000) == case["backward"]
    table = capsys.readouterr().out.splitlines()
    assert "x matmuls" in table[0]
    assert len(table) == 1 + 4 * 4


@pytest.mark.parametrize("tied", [True, False])
def test_the_sides_agree(benchmark, monkeypatch, tied):
    """Ours and the plain formula in everything; the products are there, as many of them as they should be."""
    sides = benchmark("projection_sides")
    # Several chunks, and a smaller last one.
    monkeypatch.setattr("jaxrft.models.logit_chunks.SMALLEST_CHUNK", 1)
    monkeypatch.setattr("jaxrft.models.logit_chunks.CHUNK_ELEMENTS", {"cpu": 6 * 128})
    arguments = sides.inputs(6, 16, 300, "float32", "float32", tied)
    functions = sides.functions(tied, backward=True)
    for ours, naive in zip(*(jax.tree.leaves(functions[name](*arguments)) for name in ("jaxrft", "naive"))):
        np.testing.assert_allclose(ours, naive, atol=1e-5, rtol=1e-5)
    for backward, count in ((False, 1), (True, 4)):
        for name in ("jaxrft", "matmuls", "whole matmuls"):
            trace = jax.make_jaxpr(sides.functions(tied, backward)[name])(*arguments)
            assert product_flops(trace.jaxpr) == count * 2 * 6 * 16 * 300, name
    d_hidden, d_kernel = functions["matmuls"](*arguments)[-1][0]
    d_logits = jnp.tile(arguments[5], 3)[:, :300]
    assert arguments[5].shape[1] < 300
    kernel = arguments[1] if tied else arguments[1].T
    np.testing.assert_allclose(d_hidden, d_logits @ kernel, atol=1e-4)
    np.testing.assert_allclose(d_kernel if tied else d_kernel.T, d_logits.T @ arguments[0], atol=1e-4)
