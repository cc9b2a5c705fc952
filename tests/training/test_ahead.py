"""Programs compiled before they are needed, and how few a ragged run takes."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.tracking import read_metrics
from jaxrft.training.ahead import Ahead
from tests.training.learners import learner_of, make_model, make_samples, update
from tests.training.tiny import MODEL, SCRATCH, tiny_config


def test_a_prepared_program_is_the_one_that_runs(caplog):
    traced = []

    @jax.jit
    def double(tree):
        traced.append(None)
        return jax.tree.map(lambda a: 2 * a, tree)

    ahead = Ahead(double)
    ahead.prepare({"a": np.zeros(3, np.float32)})
    ahead.prepare({"a": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(ahead({"a": jnp.arange(3.0)})["a"], [0, 2, 4])
    np.testing.assert_array_equal(ahead({"a": np.arange(3, dtype=np.float32)})["a"], [0, 2, 4])
    assert len(traced) == 1
    assert ahead.late == 0
    # Of another shape: compiled when it comes.
    np.testing.assert_array_equal(ahead({"a": jnp.ones(2)})["a"], [2, 2])
    assert ahead.late == 1
    assert "in vain" not in caplog.text, "a program was asked for that other arrays were prepared for"
    ahead.close()


def test_what_is_wrong_is_said_when_it_is_called():
    tried = []

    @jax.jit
    def fails_once(a):
        tried.append(None)
        if len(tried) == 1:
            raise RuntimeError("no memory for it")
        return a + 1

    ahead = Ahead(fails_once)
    ahead.prepare(np.zeros(2))
    with pytest.raises(RuntimeError, match="no memory for it"):
        ahead(np.zeros(2))
    np.testing.assert_array_equal(ahead(np.zeros(2)), 1)
    ahead.close()


@pytest.mark.parametrize("values", [{}, {"beta": 0.0, "steps_per_generation": 2}], ids=["reference", "two steps"])
def test_an_update_is_compiled_ahead(values):
    """Samples as long as they may be find their program; it does what one does that is compiled when it is needed."""
    results = []
    for prepared in (True, False):
        learner = learner_of(make_model(), 4, max_prompt_length=16, **values)
        if learner.needs_reference:
            learner.keep_reference()
        if prepared:
            learner.compile_ahead()
        config = learner.config
        samples = make_samples(config.rollout_samples)
        longest = [
            type(s)(
                prompt_ids=[1] * config.max_prompt_length,
                response_ids=[2] * config.max_completion_length,
                logprobs=np.full(config.max_completion_length, -1.0, np.float32),
                advantage=s.advantage,
                group=s.group,
            )
            for s in samples
        ]
        results.append(list(update(learner, longest)))
        assert (learner._step.late == 0) == prepared
        learner.close()
    assert results[0] == results[1]


def test_ragged_lengths_compile_few_programs(tmp_path, caplog):
    """Prompts of 2 to 29 tokens, completions of 1 to 64: few lengths, each compiled once.

    Counted is what is asked of the compiler, whether or not its cache has it.
    """
    rng = random.Random(0)
    rows = [
        {"prompt": "".join(rng.choices("0123456789", k=rng.randint(1, 28))) + "=", "answer": "1"} for _ in range(48)
    ]
    config = tiny_config(
        tmp_path,
        # A size of its own: no other test's programs are found.
        model=dataclasses.replace(MODEL, scratch=SCRATCH | {"hidden_size": 24, "max_position_embeddings": 128}),
        max_prompt_length=32,
        max_completion_length=64,
        max_steps=12,
    )
    jax.clear_caches()

    def asked() -> int:
        return sum(record.getMessage().startswith("Finished XLA compilation") for record in caplog.records)

    by_rollout = []

    def reward(prompts, completions, **columns):
        by_rollout.append(asked())
        return [float(len(text) % 3) for text in completions]

    trainer = RLTrainer(config=config, reward_funcs=reward, train_dataset=rows)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        trainer.train()
    steps = [r for r in read_metrics(trainer.folder.metrics) if "reward" in r]
    lengths = {round(r["completions/mean_length"], 3) for r in steps}
    assert len(lengths) > 5, "lengths are not ragged"
    # Up to the last rollout: what is saved then is of no length.
    assert 8 < by_rollout[-1] <= 12
    trainer.close()
