"""A run that is interrupted and resumed is the run that never was; damaged checkpoints are passed over."""

import gc
import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxrft import RLTrainer
from jaxrft.config import ConfigError
from jaxrft.tracking import read_metrics
from jaxrft.training import Interrupted
from jaxrft.training.checkpoint import Checkpoints
from tests.training.tiny import ROWS, digits, tiny_config

SETTINGS = {
    "max_steps": 6,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "beta": 0.05,
    "warmup_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 3,
    "logging_steps": 3,
}


def make_trainer(folder, reward=digits, **changes):
    config = tiny_config(folder, **SETTINGS | changes)
    return RLTrainer(config=config, reward_funcs=reward, train_dataset=ROWS[:-4], eval_dataset=ROWS[-4:])


def signalling(calls, number):
    """A reward that sends a signal to this process in its ``calls``-th call."""
    count = 0

    def digits_then_signal(**columns):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), number)
        return digits(**columns)

    digits_then_signal.__name__ = "digits"
    return digits_then_signal


def lasting(record):
    """A record without what depends on the clock and the machine."""
    moving = ("time", "compiles", "tokens_per_second", "peak_memory")
    return {k: v for k, v in record.items() if not k.startswith(moving)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("whole") / "run")
    trainer.train()
    return trainer


@pytest.mark.parametrize(("calls", "number"), [(4, signal.SIGINT), (6, signal.SIGTERM)])
def test_interrupted_and_resumed_is_bit_equal(whole, tmp_path, calls, number):
    with pytest.raises(Interrupted):
        make_trainer(tmp_path / "run", signalling(calls, number)).train()
    stopped_at = max(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert 0 < stopped_at < 6
    resumed = make_trainer(tmp_path / "run", resume_from_checkpoint=True)
    resumed.train()
    pairs = zip(*map(jax.tree.leaves, (whole.learner.state, resumed.learner.state)))
    assert all(np.array_equal(a, b) for a, b in pairs)
    expected = [lasting(r) for r in read_metrics(whole.folder.metrics)]
    assert [lasting(r) for r in read_metrics(resumed.folder.metrics)] == expected
    for name in sorted(os.listdir(whole.folder.path / "completions")):
        ours, theirs = (f.path / "completions" / name for f in (resumed.folder, whole.folder))
        assert ours.read_text() == theirs.read_text()


def damage(folder, how):
    files = [p for p in (folder / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        if how == "truncated":
            data = data[: len(data) // 2]
        else:
            data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys, how):
    shutil.copytree(whole.folder.path, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["2", "4", "6"]
    damage(checkpoints / "6", how)
    resumed = make_trainer(tmp_path / "run", resume_from_checkpoint=True)
    resumed.train()
    said = capsys.readouterr().out
    assert "checkpoints/6 cannot be read" in said
    assert "from step 4" in said
    pairs = zip(*map(jax.tree.leaves, (whole.learner.state, resumed.learner.state)))
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_reads_beside_a_damaged_array_end_before_what_they_report_to(tmp_path, monkeypatch):
    """Else native threads report to an event loop that is closed; processes have died of that."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(repr(found.exc_value)))
    rng = np.random.default_rng(0)
    state = {f"a{i}": jax.numpy.asarray(rng.normal(size=(64, 64 + i)), "float32") for i in range(60)}
    checkpoints = Checkpoints(tmp_path, limit=2, warn=heard.append)
    for step in (1, 2):
        checkpoints.save(step, state, {}, {})
        checkpoints.wait()
    damage(tmp_path / "2", "flipped")
    restored = checkpoints.restore(state)
    checkpoints.close()
    gc.collect()
    assert restored.step == 1
    assert len(heard) == 1, heard[:3]
    assert "2 cannot be read" in heard[0]


def test_a_state_is_not_held_twice_while_it_is_restored(whole, tmp_path, monkeypatch):
    """Parameters are, where a step has its gradients: 16 bytes each in place of 24."""
    shutil.copytree(whole.folder.path, tmp_path / "run")

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    before, restore, peaks = held(), ocp.CheckpointManager.restore, []
    trainer = make_trainer(tmp_path / "run", resume_from_checkpoint=True)

    def told(*arguments, **options):
        restored = restore(*arguments, **options)
        peaks.append(held() - before)
        return restored

    monkeypatch.setattr(ocp.CheckpointManager, "restore", told)
    size = sum(array.nbytes for array in jax.tree.leaves(trainer.learner.state.params))
    trainer.train()
    assert 4 * size < peaks[0] < 4.5 * size
    pairs = zip(*map(jax.tree.leaves, (whole.learner.state, trainer.learner.state)))
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_no_readable_checkpoint_is_an_error(whole, tmp_path):
    shutil.copytree(whole.folder.path, tmp_path / "run")
    for step in ("2", "4", "6"):
        damage(tmp_path / "run" / "checkpoints" / step, "truncated")
    trainer = make_trainer(tmp_path / "run", resume_from_checkpoint=True)
    first = [np.asarray(array) for array in jax.tree.leaves(trainer.learner.state)]
    with pytest.raises(ConfigError, match="none of the checkpoints"):
        trainer.train()
    # Nothing is half there.
    assert all(np.array_equal(a, b) for a, b in zip(first, jax.tree.leaves(trainer.learner.state)))


def test_best_checkpoint_is_kept(tmp_path):
    """The first evaluation is the best of a run whose reward falls."""
    calls = iter(range(100))

    def falling(completions, **_):
        value = -next(calls)
        return [value + 0.1 * (i % 2) for i in range(len(completions))]

    trainer = make_trainer(tmp_path / "run", falling, metric_for_best_model="eval/reward", save_total_limit=1)
    trainer.train()
    assert sorted(os.listdir(trainer.folder.checkpoints)) == ["0", "6"]
    smaller = make_trainer(
        tmp_path / "small", falling, metric_for_best_model="eval/reward", save_total_limit=1, greater_is_better=False
    )
    smaller.train()
    assert sorted(os.listdir(smaller.folder.checkpoints)) == ["6"]


def test_the_best_is_chosen_by_its_own_step(tmp_path):
    """An evaluation counts for the checkpoint of its step alone, however rarely metrics are logged."""
    heights = iter([0.1, 0.9, 0.2, 0.3])

    def peaked(prompts, completions, **_):
        held_out = prompts[0] == ROWS[-4]["prompt"]
        return [next(heights)] * len(completions) if held_out else digits(completions)

    settings = {"metric_for_best_model": "eval/reward", "save_total_limit": 1, "save_steps": 1, "logging_steps": 8}
    trainer = make_trainer(tmp_path / "run", peaked, **settings)
    trainer.train()
    assert sorted(os.listdir(trainer.folder.checkpoints)) == ["2", "6"]


def test_a_folder_that_holds_a_run_is_not_overwritten(whole):
    before = json.loads(json.dumps(read_metrics(whole.folder.metrics)))
    with pytest.raises(ConfigError, match="already holds a run.*resume_from_checkpoint=true"):
        make_trainer(whole.folder.path).train()
    assert read_metrics(whole.folder.metrics) == before


def test_a_changed_config_is_said(whole, tmp_path, capsys):
    shutil.copytree(whole.folder.path, tmp_path / "run")
    make_trainer(tmp_path / "run", resume_from_checkpoint=True, eval_steps=3).train()
    said = capsys.readouterr().out
    assert "the config of this run has changed: eval_steps: 2 -> 3" in said
    assert "output_dir" in said
    assert "seed" not in said


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        make_trainer(tmp_path / "none", resume_from_checkpoint=True).train()
