"""Training with an engine that has a copy of the weights: parity, and log-probabilities that it does not know."""

import dataclasses

import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import AuditConfig, ConfigError, RolloutConfig
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.transfer.send import Report
from jaxrft.tracking import read_metrics
from jaxrft.training import run
from jaxrft.training.parity import ParityError
from tests.training.tiny import ROWS, digits, tiny_config


class CopyingEngine:
    """The native engine, as if its weights were a copy on servers.

    Args:
        native: does the work.
        shift: added to every log-probability.
        knows: whether it says log-probabilities of truncated sampling.
    """

    keeps_params = False
    sleeps = True

    def __init__(self, native, shift=0.0, knows=True):
        self._native, self._shift, self._knows = native, shift, knows
        self.calls, self.fixed = [], 0
        self.last_transfer = None

    @property
    def version(self):
        return self._native.version

    def generate(self, requests, sampling, on_progress=None):
        self.calls.append("generate")
        completions = self._native.generate(requests, sampling, on_progress)
        knows = self._knows or (sampling.top_k, sampling.top_p) == (0, 1.0)
        return [
            dataclasses.replace(c, logprobs=np.asarray(c.logprobs) + self._shift if knows else None)
            for c in completions
        ]

    def update_weights(self, params, version):
        self.calls.append(f"weights {version}")
        self._native.update_weights(params, version)
        self.last_transfer = Report(0.25, 4000, 3)

    def sleep(self, level=1):
        self.calls.append(f"sleep {level}")

    def wake(self, tags=None):
        self.calls.append("wake" if tags is None else f"wake {tags[0]}")

    def close(self):
        self._native.close()


def make_trainer(folder, shift=0.0, knows=True, **changes):
    config = tiny_config(folder / "run", max_steps=2, **changes)
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    trainer.engine = CopyingEngine(trainer.engine, shift, knows)
    trainer.collector.engine = trainer.engine
    return trainer


@pytest.mark.parametrize(("parity", "times"), [("first", 2), ("always", 3)])
def test_parity_is_due(tmp_path, monkeypatch, capsys, parity, times):
    """After the first transfer and the first to an engine that slept, or after each of the three."""
    trainer = make_trainer(tmp_path, rollout=RolloutConfig(parity=parity))
    gaps, original = [], trainer.check_parity
    monkeypatch.setattr(trainer, "check_parity", lambda: gaps.append(original()) or gaps[-1])
    trainer.train()
    assert len(gaps) == times
    assert all(gap <= 1e-5 for gap in gaps)
    assert capsys.readouterr().out.count("parity: engine and trainer agree") == 2


def test_without_parity_weights_go_back_and_forth(tmp_path):
    """Memory goes to training and comes back, weights first and caches last; transfers are in the metrics."""
    trainer = make_trainer(tmp_path, rollout=RolloutConfig(parity="never"))
    trainer.train()
    transfer = ["wake weights", "weights {}", "wake"]
    rollout = ["generate", "sleep 2", *transfer]
    expected = [call.format(0) for call in transfer]
    expected += [call.format(step) for step in (1, 2) for call in rollout]
    assert trainer.engine.calls[: len(expected)] == expected
    record = next(r for r in read_metrics(trainer.folder.metrics) if "reward" in r)
    assert [record[f"weights/{name}"] for name in ("seconds", "bytes", "buckets")] == [0.25, 4000, 3]


def test_an_engine_that_disagrees(tmp_path):
    """Nothing is trained, and the message says what may be the matter; the tolerance is the audit's."""
    trainer = make_trainer(tmp_path, shift=2e-3)
    with pytest.raises(ParityError, match=r"^parity: .*: largest 0\.002, tolerance 0\.0001\. Likely causes: tied") as e:
        trainer.train()
    assert trainer.learner.step == 0
    assert trainer.engine.calls.count("generate") == 1
    for cause in ("rope", "dtype", "tokenizer", "version", "rollout.parity=never"):
        assert cause in str(e.value)
    loose = make_trainer(tmp_path / "loose", shift=2e-3, audit=AuditConfig(logprob_tolerance=0.1))
    loose.hand_over()
    assert loose.check_parity() == pytest.approx(2e-3, rel=0.01)


def test_not_a_number_is_no_parity(tmp_path):
    trainer = make_trainer(tmp_path, shift=np.nan)
    trainer.hand_over()
    with pytest.raises(ParityError, match="nan"):
        trainer.check_parity()


def test_missing_logprobs(tmp_path):
    """``missing_logprobs``: trainer trains as if the engine agreed with it to the last bit, stop refuses."""
    trainer = make_trainer(tmp_path, knows=False, top_k=3, rollout=RolloutConfig(missing_logprobs="trainer"))
    trainer.train()
    records = [r for r in read_metrics(trainer.folder.metrics) if "reward" in r]
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        assert record["sampling/logprob_difference/max"] == 0
        assert record["sampling/kl"] == 0
        assert record["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert record["grad_norm"] > 0
    # With log-probabilities from the engine the updates are the same, as it is the trainer's model that it runs.
    whole = make_trainer(tmp_path / "whole", top_k=3)
    whole.train()
    wanted = [r for r in read_metrics(whole.folder.metrics) if "reward" in r]
    for record, other in zip(records, wanted):
        assert record["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    stopped = make_trainer(tmp_path / "stopped", knows=False, top_k=3)
    with pytest.raises(ConfigError, match=r"^rollout\.missing_logprobs: the engine does not know"):
        stopped.train()
    assert stopped.learner.step == 0


@pytest.mark.parametrize(("error", "code"), [(ParityError("parity: off"), 3), (EngineError("server 0: gone"), 4)])
def test_exit_codes(tmp_path, monkeypatch, capsys, error, code):
    def fail(config):
        raise error

    monkeypatch.setattr(run, "RLTrainer", fail)
    assert run.run(tiny_config(tmp_path)) == code
    assert capsys.readouterr().err.strip() == f"error: {error}"
