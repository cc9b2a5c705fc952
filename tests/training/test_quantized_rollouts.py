"""Training on what an engine with 8-bit kernels samples: corrected, audited with a tolerance of its own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import AlgorithmConfig, AuditConfig, ConfigError, RLConfig, RolloutConfig
from jaxrft.config.parse import from_dict
from jaxrft.training import AuditError, learner, parts
from jaxrft.training.audit import Audit
from jaxrft.training.parity import ParityError
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config

FP8 = RolloutConfig(quantization="fp8")
CORRECTED = AlgorithmConfig(correction="truncate")
# Sharp enough that the gap is not lost in rounding.
SHARP = dataclasses.replace(MODEL, scratch=SCRATCH | {"initializer_range": 0.2})


def make_trainer(folder: Path, **changes):
    settings = {"rollout": FP8, "algorithm": CORRECTED, "model": SHARP} | changes
    return RLTrainer(
        config=tiny_config(folder / "run", **settings), reward_funcs=digits, train_dataset=ROWS, eval_dataset=ROWS[:2]
    )


def test_a_run_is_corrected_and_audited(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    before = trainer.learner.state.params["embed"]["embedding"].get_value() + 0
    trainer.train()
    assert "audit passed" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "sampling/kl" in record]
    assert len(steps) == 4
    for record in steps:
        # Above what float32 rounds away, below what the audit lets through.
        assert 1e-4 < record["sampling/logprob_difference/mean"] < 0.1
        assert record["correction/weight_mean"] != 1.0
    after = trainer.learner.state.params["embed"]["embedding"].get_value()
    # What is trained are the parameters as ever.
    assert after.dtype == before.dtype == np.float32
    assert not np.array_equal(before, after)
    assert 1e-4 < trainer.check_parity() < 0.1


def test_a_planted_fault_stops_it(tmp_path, monkeypatch):
    original = learner.make_batch

    def shifted(*arguments, **options):
        batch = original(*arguments, **options)
        return dataclasses.replace(batch, places=np.maximum(batch.places - 1, 0))

    monkeypatch.setattr(learner, "make_batch", shifted)
    with pytest.raises(AuditError, match=r"differ: mean [\d.]+, tolerance 0.1.*rollout.quantization=none"):
        make_trainer(tmp_path).train()


def test_the_tolerance_can_be_set(tmp_path):
    trainer = make_trainer(tmp_path, audit=AuditConfig(logprob_tolerance=1e-6))
    with pytest.raises(AuditError, match="tolerance 1e-06"):
        trainer.train()
    with pytest.raises(ParityError, match="tolerance 1e-06"):
        trainer.check_parity()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_trainer_alone_computes_is_held_as_ever(dtype):
    plain, audit = (Audit(AuditConfig(), dtype, quantization) for quantization in ("none", "fp8"))
    assert audit.ratio_tolerance == plain.ratio_tolerance
    np.testing.assert_array_equal(audit.ratio_bounds, plain.ratio_bounds)
    gaps = np.array([0.0, 0.3])
    assert (audit.word, audit.gap(gaps)) == ("mean", 0.15)
    scored, mask = np.zeros((1, 2)), np.ones((1, 2))
    for each in (plain, audit):
        with pytest.raises(AuditError, match="policy and reference differ"):
            each.check_reference(scored + gaps, scored, mask)
    if dtype == "float32":
        with pytest.raises(AuditError, match="largest 0.3"):
            audit.check_reference(scored + gaps, scored, mask)


def test_it_wants_a_correction():
    with pytest.raises(ConfigError, match=r"^rollout.quantization: fp8 samples .*set algorithm.correction=truncate"):
        parts.build_recipe(RLConfig(rollout=FP8))
    # The recipe's own, the config's, and the explicit wish for none.
    for algorithm in ({"recipe": "tis_grpo"}, {"correction": "mask"}, {"correction": "none"}):
        config = from_dict({"rollout": {"quantization": "fp8"}, "algorithm": algorithm})
        expected = algorithm.get("correction", "truncate")
        assert parts.build_recipe(config).policy.correction == expected


def test_values_that_are_refused():
    with pytest.raises(ConfigError, match=r"rollout.quantization: got 'fp4', takes none or fp8"):
        from_dict({"rollout": {"quantization": "fp4"}})
    with pytest.raises(ConfigError, match=r"rollout.quantization: got fp8 with engine vllm; .*remove it"):
        from_dict({"rollout": {"quantization": "fp8", "engine": "vllm"}})


@pytest.mark.soak
def test_sharded_runs_are_those_of_one_device(run_python):
    """Parameters are gathered for the engine before they are quantised; the audit passes, and updates are the same."""
    done = run_python(
        """
        import tempfile
        from jaxrft.config import ParallelConfig
        from tests.training.test_quantized_rollouts import Path, make_trainer

        for sizes in ({}, {"fsdp": 2, "tensor": 2, "sequence": 2, "strategy": "zero3"}):
            rows = 8 // sizes.get("fsdp", 1)
            settings = {"parallel": ParallelConfig(**sizes), "per_device_train_batch_size": rows, "max_steps": 1}
            with tempfile.TemporaryDirectory() as folder:
                metrics = make_trainer(Path(folder), **settings).train()
            print("found", metrics["grad_norm"], metrics["sampling/logprob_difference/mean"])
        """.replace("\n        ", "\n"),
        devices=8,
    )
    found = [[float(x) for x in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("found")]
    assert len(found) == 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
