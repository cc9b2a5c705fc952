"""The audit of the first update: three planted faults, each of which must stop the run before it trains."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import AuditConfig
from jaxrft.training import AuditError, cycle, learner, rollouts
from tests.training.tiny import ROWS, digits, tiny_config


def make_trainer(folder, **changes):
    return RLTrainer(
        config=tiny_config(folder / "run", **changes), reward_funcs=digits, train_dataset=ROWS, eval_dataset=ROWS[:2]
    )


def expect_stop(trainer, cause):
    before = [np.array(x) for x in jax.tree.leaves(trainer.learner.state.params)]
    with pytest.raises(AuditError, match=cause) as caught:
        trainer.train()
    after = jax.tree.leaves(trainer.learner.state.params)
    assert all(np.array_equal(a, b) for a, b in zip(before, after)), "parameters changed"
    assert "Likely causes" in str(caught.value)
    assert "quantization" not in str(caught.value)
    assert not list(trainer.folder.path.glob("final/*"))
    assert trainer.evaluate(), "the trainer can still be used"


def test_a_sound_run_passes(tmp_path, capsys):
    make_trainer(tmp_path, beta=0.1).train()
    assert "audit passed" in capsys.readouterr().out


def test_wrong_temperature(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cycle,
        "training_sampling",
        lambda config: dataclasses.replace(rollouts.training_sampling(config), temperature=config.temperature * 1.02),
    )
    expect_stop(make_trainer(tmp_path), "another temperature")


@pytest.mark.parametrize("shift", [-1, 1])
def test_mask_shifted_by_one(tmp_path, monkeypatch, shift):
    original = learner.make_batch

    def shifted(*arguments, **options):
        batch = original(*arguments, **options)
        return dataclasses.replace(batch, mask=np.roll(batch.mask, shift, axis=-1))

    monkeypatch.setattr(learner, "make_batch", shifted)
    # Completions of one length would hide the shift from a comparison of counts alone.
    expect_stop(make_trainer(tmp_path, max_completion_length=6), "mask does not lie over")


def test_response_shifted_by_one(tmp_path, monkeypatch):
    original = learner.make_batch

    def shifted(*arguments, **options):
        batch = original(*arguments, **options)
        return dataclasses.replace(batch, places=np.maximum(batch.places - 1, 0))

    monkeypatch.setattr(learner, "make_batch", shifted)
    expect_stop(make_trainer(tmp_path), "mask does not lie over")


def test_stale_engine_weights(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    stale = jax.tree.map(lambda p: p * 1.01, trainer.learner.state.params)
    given = trainer.engine.update_weights
    monkeypatch.setattr(trainer.engine, "update_weights", lambda params, version: given(stale, version))
    expect_stop(trainer, "stale or other weights")


def test_old_logprobs_of_other_parameters(tmp_path, monkeypatch):
    """The ratio is measured inside the step, which must change nothing when it is off."""
    original = learner.Learner.prepare

    def spoiled(self, samples, **options):
        batch = original(self, samples, **options)
        return dataclasses.replace(batch, old_logprobs=batch.old_logprobs - 3e-5)

    monkeypatch.setattr(learner.Learner, "prepare", spoiled)
    expect_stop(make_trainer(tmp_path), r"\|ratio - 1\|")
    make_trainer(tmp_path / "loose", audit=AuditConfig(ratio_tolerance=1e-4), max_steps=1).train()


def test_reference_is_another_model(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, beta=0.1)
    keep = trainer.learner.keep_reference

    def keep_another():
        keep()
        trainer.learner.reference = jax.tree.map(lambda p: p * 1.001, trainer.learner.reference)

    monkeypatch.setattr(trainer.learner, "keep_reference", keep_another)
    expect_stop(trainer, "reference is not the model")


@pytest.mark.parametrize("spoil", [lambda p, t: p + t, lambda p, t: t[1:]], ids=["prompt glued", "first letter cut"])
def test_rewards_see_another_text(tmp_path, monkeypatch, spoil):
    from jaxrft.training import collector

    original = collector.completion_texts
    monkeypatch.setattr(
        collector, "completion_texts", lambda tok, done: [spoil("0+0=", text) for text in original(tok, done)]
    )
    expect_stop(make_trainer(tmp_path), "not what the model wrote")


def test_the_audit_can_be_turned_off_and_loosened(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cycle,
        "training_sampling",
        lambda config: dataclasses.replace(rollouts.training_sampling(config), temperature=config.temperature * 1.02),
    )
    make_trainer(tmp_path / "off", audit=AuditConfig(enabled=False), max_steps=1).train()
    make_trainer(tmp_path / "loose", audit=AuditConfig(logprob_tolerance=1.0), max_steps=1).train()
    with pytest.raises(AuditError):
        make_trainer(tmp_path / "tight", audit=AuditConfig(logprob_tolerance=1e-4), max_steps=1).train()
