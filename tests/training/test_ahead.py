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


def test_what_cannot_be_compiled_ahead_is_compiled_when_it_is_called(caplog):
    """There may be more memory by then; what is wrong in itself is raised by the call."""
    failures = ["no memory for it"]

    @jax.jit
    def function(a):
        if failures:
            raise RuntimeError(failures.pop())
        return a + 1

    ahead = Ahead(function)
    ahead.prepare(np.zeros(2))
    np.testing.assert_array_equal(ahead(np.zeros(2)), 1)
    assert "could not be compiled ahead: no memory for it" in caplog.text
    failures += ["wrong", "wrong"]
    ahead.prepare(np.zeros(3))
    with pytest.raises(RuntimeError, match="wrong"):
        ahead(np.zeros(3))
    np.testing.assert_array_equal(ahead(np.zeros(3)), 1)
    ahead.close()


@pytest.mark.parametrize("values", [{}, {"beta": 0.0, "steps_per_generation": 2}], ids=["reference", "two steps"])
def test_an_update_is_compiled_ahead(values, monkeypatch, caplog):
    """The longest samples find both programs; of others the step is begun before they are scored. Results are the same.

    The counts are of programs that were compiled when they were called for.
    """
    results, begun = [], []
    for prepared in (True, False):
        learner = learner_of(make_model(), 4, max_prompt_length=16, **values)
        if learner.needs_reference:
            learner.keep_reference()
        if prepared:
            learner.compile_ahead()
        score = learner._score

        def scored(*arguments, learner=learner, score=score):
            begun.append(len(learner._step._programs))
            return score(*arguments)

        monkeypatch.setattr(learner, "_score", scored)
        longest, shorter = (samples_of_length(learner.config, divisor) for divisor in (1, 2))
        results.append([update(learner, longest)])
        assert (score.late > 0, learner._step.late) == ((False, 0) if prepared else (True, 1))
        results[-1].append(update(learner, shorter))
        assert (score.late > 0, learner._step.late) == ((True, 0) if prepared else (True, 2))
        score.close()
        learner._step.close()
    assert results[0] == results[1]
    calls = 2 if "beta" not in values else 1
    assert begun == [1] * calls + [2] * calls + [0] * 2 * calls
    assert "in vain" not in caplog.text


def samples_of_length(config, divisor):
    """A rollout of samples of one length, the longest over ``divisor``."""
    prompt, response = config.max_prompt_length // divisor, config.max_completion_length // divisor
    return [
        dataclasses.replace(
            sample,
            prompt_ids=[1] * prompt,
            response_ids=[2] * response,
            logprobs=np.full(response, -1.0, np.float32),
        )
        for sample in make_samples(config.rollout_samples)
    ]


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
