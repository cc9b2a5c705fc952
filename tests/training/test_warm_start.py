"""The supervised stage before RL: what it holds, and how it ends."""

import gc

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import WarmStartConfig
from jaxrft.training import warm_start
from jaxrft.training.state import delete, is_deleted
from tests.training.tiny import ROWS, digits, tiny_config


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start.SupervisedStage, "_look", lambda *_: 0.0)
    config = tiny_config(tmp_path, warm_start=WarmStartConfig(max_steps=2))
    return RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)


def live(shape):
    gc.collect()
    return len({array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.shape == shape})


def test_one_set_of_moments_at_a_time(trainer, monkeypatch):
    """A parameter and its two moments: in each step, and where the stage hands over to RL's optimizer."""
    shape = trainer.model.embed.embedding.shape
    others, counts, make_step, reset = live(shape) - 3, [], warm_start._make_step, trainer.learner.reset
    assert others >= 0

    def counting_step(*arguments):
        step = make_step(*arguments)

        def run(state, batch):
            state, loss = step(state, batch)
            counts.append(live(shape) - others)
            return state, loss

        return run

    def counting_reset(params):
        reset(params)
        counts.append(live(shape) - others)

    monkeypatch.setattr(warm_start, "_make_step", counting_step)
    monkeypatch.setattr(trainer.learner, "reset", counting_reset)
    warm_start.SupervisedStage(trainer, None, None, lambda: None).run()
    assert counts == [3, 3, 3]


def test_what_a_step_fails_of_is_told(trainer, monkeypatch):
    """Where it has taken the state along, too: nothing is handed over that is gone."""

    def failing_step(*_):
        def run(state, batch):
            delete(state)
            raise RuntimeError("out of memory")

        return run

    def update_weights(params, version):
        assert not is_deleted(params), "handed over"

    monkeypatch.setattr(warm_start, "_make_step", failing_step)
    monkeypatch.setattr(trainer.engine, "update_weights", update_weights)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()


def test_one_that_ends_before_its_first_step_leaves_the_first_state(trainer, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start.SupervisedStage, "_look", interrupted)
    before = [np.asarray(array) for array in jax.tree.leaves(trainer.learner.state)]
    with pytest.raises(KeyboardInterrupt):
        warm_start.SupervisedStage(trainer, None, None, lambda: None).run()
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(trainer.learner.state), strict=True))
