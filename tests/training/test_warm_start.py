"""The supervised stage before RL: what it holds, and how it ends."""

import gc

import jax
import pytest

from jaxrft import RLTrainer
from jaxrft.config import WarmStartConfig
from jaxrft.training import warm_start
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
    """Where it has taken the state along, too."""

    def failing_step(*_):
        def run(state, batch):
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            raise RuntimeError("out of memory")

        return run

    monkeypatch.setattr(warm_start, "_make_step", failing_step)
    with pytest.raises(RuntimeError, match="out of memory"):
        warm_start.SupervisedStage(trainer, None, None, lambda: None).run()
