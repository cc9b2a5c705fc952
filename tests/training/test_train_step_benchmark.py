"""The benchmark of one optimizer step: its report, its FLOPs, and that the other side does the same work."""

from __future__ import annotations

import importlib
import json
import math

import jax
import jax.extend.core
import numpy as np
import pytest
from flax import nnx

from jaxrft import models
from jaxrft.training.batch import Sample
from tests.conftest import ROOT
from tests.jaxprs import count, equations, product_flops


@pytest.fixture
def benchmark(monkeypatch):
    """Its modules by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_report_is_complete_and_consistent(benchmark, tmp_path, capsys):
    output = tmp_path / "folder" / "report.json"
    command = (
        "--models tiny --lengths 16 --rows 2 --remat none --batching padded --strategies auto zero3 --micro-batches 2"
    )
    benchmark("train_step").main(
        [*command.split(), "--steps", "2", "--in-process", "--ceiling-size", "128", "--output", str(output)]
    )
    report = json.loads(output.read_text())
    assert report["command"].startswith("python benchmarks/train_step.py --models tiny")
    assert {"date", "device", "host", "versions", "flops", "options"} <= set(report)
    assert report["versions"]["jax"] == jax.__version__
    case, failed = report["cases"]
    # One device has nothing to shard over.
    assert failed["settings"]["strategy"] == "zero3"
    assert "ConfigError" in failed["error"]
    assert len(case["step_seconds"]) == len(case["torch"]["step_seconds"]) == 2
    assert case["tokens_per_second"] * case["seconds"] == pytest.approx(case["valid_tokens"])
    assert case["computed_tokens"] == math.prod(case["batch_shape"]) == 2 * 2 * 16
    assert case["computed_tokens_per_second"] * case["seconds"] == pytest.approx(64)
    assert case["speed_over_torch"] == pytest.approx(case["torch"]["seconds"] / case["seconds"])
    assert case["memory"]["peak_bytes"] > 0
    assert case["plan"]["update_bytes"] == pytest.approx(sum(case["plan"]["items"].values()))
    assert case["lower_seconds"] > 0
    assert case["compile_seconds"] > 0
    flops = flops_by_hand(benchmark("step_shapes").make_samples(4, 16, 256))
    ceiling = case["matmul_ceiling"]["flops_per_second"]
    assert case["utilisation"] == pytest.approx(flops / case["seconds"] / ceiling)
    table = capsys.readouterr().out.splitlines()
    assert "tokens/s" in table[0]
    assert "failed: ConfigError" in table[2]


def flops_by_hand(samples):
    """Of the tiny shape: 2 layers of 4 heads of 16 channels, 2 key heads; 64, 128 and 256 channels and tokens."""
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    total = 0
    for sample in samples:
        size, response = len(sample.prompt_ids) + len(sample.response_ids), len(sample.response_ids)
        # Of each product forward 2 FLOPs a parameter, backward 4; attention has two products, half of them hidden.
        total += 6 * 2 * layer * size + 6 * 64 * 256 * response
        total += 2 * 3 * 2 * 2 * size * size * 64 / 2
    return total


def test_flops_are_those_of_the_traced_products(benchmark):
    shapes = benchmark("step_shapes")
    model = models.from_config(shapes.hf_config("tiny", 24))
    graphdef, params = nnx.split(model)
    tokens = np.zeros((3, 24), np.int32)
    trace = jax.make_jaxpr(jax.grad(lambda params: nnx.merge(graphdef, params)(tokens).sum()))(params)
    spec = model.spec
    # That program projects every token, and attends to what the mask hides.
    samples = [Sample(prompt_ids=[], response_ids=[0] * 24, logprobs=np.zeros(24)) for _ in range(3)]
    hidden = 12 * spec.num_layers * spec.num_heads * spec.head_dim * 3 * 24**2 / 2
    assert product_flops(trace.jaxpr) == shapes.model_flops(spec, samples) + hidden


def test_no_loop_goes_over_tokens(benchmark):
    """Of a step on packed rows: on a GPU each turn of a loop costs as much as a kernel of a large product."""
    case_module, length = benchmark("step_case"), 768
    case = case_module.Case(
        model="tiny", length=length, dtype="float32", strategy=None, mesh={}, remat="none", scan_layers=False,
        packed=True, micro_batches=2, rows=1,
    )  # fmt: skip
    ours = case_module.OurStep(case)
    assert ours.batch.segment_ids is not None
    trace = jax.make_jaxpr(ours.learner._step._function)(
        ours.learner.state, ours.batch, benchmark("step_ours").UNBOUNDED, ours.kl_coef
    )
    found = [equation for equation, _ in equations(trace.jaxpr)]
    turns = [e.params["length"] for e in found if e.primitive.name == "scan"]
    assert turns
    assert max(turns) <= length // 16
    # Loops of unknown length, at each of whose turns a GPU's host waits, are over micro-batches and attention's blocks.
    loops = [e.params["body_jaxpr"] for e in found if e.primitive.name == "while"]
    assert loops
    assert all(count(body, "dot_general") for body in loops)
    assert not any("callback" in e.primitive.name for e in found)


@pytest.mark.parametrize("packed", [False, True])
def test_torch_makes_the_same_step(benchmark, tmp_path, packed):
    transformers = pytest.importorskip("transformers")
    case_module, torch_module = benchmark("step_case"), benchmark("step_torch")
    case = case_module.Case(
        model="tiny", length=24, dtype="float32", strategy=None, mesh={}, remat="full", scan_layers=True,
        packed=packed, micro_batches=2, rows=3,
    )  # fmt: skip
    ours = case_module.OurStep(case)
    models.save(ours.learner.model, tmp_path)
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    theirs = torch_module.TorchStep(
        model, ours.batch, dtype="float32", checkpointing=True, learning_rate=1e-6, max_grad_norm=1.0, clip=0.2
    )
    for _ in range(2):
        stats, (loss, norm) = ours(), theirs()
        np.testing.assert_allclose([float(stats["loss"]), float(stats["grad_norm"])], [loss, norm], rtol=1e-4)
    assert packed == (ours.batch.segment_ids is not None)


def test_torchs_segments_are_those_of_the_rows(benchmark):
    """Row after row, and none that goes from one row to the next though both have the same id."""
    segments = np.array([[0, 0, 0, 1, 2, 2], [2, 2, 3, 3, 3, 3]])
    assert benchmark("step_varlen").segment_lengths(segments).tolist() == [3, 1, 2, 2, 4]
    assert benchmark("step_varlen").segment_lengths(np.array([[5]])).tolist() == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_torch_gives_the_same_logprobs(benchmark, tmp_path, packed):
    transformers = pytest.importorskip("transformers")
    case_module, torch_module = benchmark("step_case"), benchmark("step_torch")
    case = case_module.Case(
        model="tiny", length=24, dtype="float32", strategy=None, mesh={}, remat="none", scan_layers=True,
        packed=packed, micro_batches=2, rows=3, work="logprobs",
    )  # fmt: skip
    ours = case_module.OurScoring(case)
    models.save(models.from_config(benchmark("step_shapes").hf_config("tiny", 24), seed=ours.config.seed), tmp_path)
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    theirs = torch_module.TorchStep(
        model, ours.batch, dtype="float32", checkpointing=False, learning_rate=1e-6, max_grad_norm=1.0, clip=0.2,
        update=False,
    )  # fmt: skip
    np.testing.assert_allclose(np.sum(ours()["logprob_sum"]), theirs()[0], rtol=1e-5)


def test_forward_pass_has_a_report_of_its_own(benchmark, capsys):
    command = "--pass logprobs --models tiny --lengths 16 --rows 2 --remat none --batching padded --micro-batches 1"
    report = benchmark("train_step").main(
        [*command.split(), "--steps", "1", "--warm-up", "1", "--in-process", "--ceiling-size", "64", "--no-peer"]
    )
    [case] = report["cases"]
    assert case["settings"]["work"] == "logprobs"
    flops = flops_by_hand(benchmark("step_shapes").make_samples(2, 16, 256)) / 3
    assert case["utilisation"] == pytest.approx(flops / case["seconds"] / case["matmul_ceiling"]["flops_per_second"])
    assert case["logprob_sum"] < 0
    assert "plan" not in case
    assert "failed" not in capsys.readouterr().out
