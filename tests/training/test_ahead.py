"""Programs compiled before they are needed, and how few a ragged run takes."""

import dataclasses
import random
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import AuditConfig, BatchingConfig, ParallelConfig
from jaxrft.models import Decoder
from jaxrft.rollout import programs
from jaxrft.tracking import read_metrics
from jaxrft.training import learner as learner_module
from jaxrft.training.ahead import THREADS, Ahead
from tests.training.learners import learner_of, make_model, make_samples, update
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config


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


def test_no_program_waits_for_another():
    """Closed, more may be prepared; and Ctrl-C in one of the threads is over when it has been raised."""
    go_on, interrupted = threading.Event(), []

    @jax.jit
    def function(a):
        if a.shape[0] < 10:
            assert go_on.wait(60)
        if a.shape[0] == 11 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return a + 1

    ahead = Ahead(function)
    for size in [*range(1, THREADS), 10]:
        ahead.prepare(np.zeros(size))
    np.testing.assert_array_equal(ahead(np.zeros(10)), 1)
    ahead.prepare(np.zeros(THREADS))
    ahead.prepare(np.zeros(12))
    ahead.close()
    # It had not been begun.
    np.testing.assert_array_equal(ahead(np.zeros(12)), 1)
    assert ahead.late == 1
    ahead.prepare(np.zeros(11))
    with pytest.raises(KeyboardInterrupt):
        ahead(np.zeros(11))
    np.testing.assert_array_equal(ahead(np.zeros(11)), 1)
    go_on.set()
    np.testing.assert_array_equal(ahead(np.zeros(1)), 1)
    assert ahead.late == 2
    ahead.close()


NO_AUDIT = AuditConfig(enabled=False)


@pytest.mark.parametrize(
    ("values", "scored"),
    [
        ({}, True),
        ({"audit": NO_AUDIT}, True),
        ({"audit": NO_AUDIT, "beta": 0.0, "num_iterations": 2}, True),
        ({"beta": 0.0, "steps_per_generation": 2}, True),
        ({"audit": NO_AUDIT, "beta": 0.0}, False),
    ],
    ids=["audit", "reference", "two iterations", "two steps", "not scored"],
)
def test_an_update_is_compiled_ahead(values, scored, caplog):
    """The longest samples find what they take, and others the step that was begun for them; results are the same."""
    results = []
    for prepared in (True, False):
        parallel = ParallelConfig(compile_ahead=prepared)
        learner = learner_of(make_model(), 4, max_prompt_length=16, parallel=parallel, **values)
        if learner.needs_reference:
            learner.keep_reference()
        learner.compile_ahead()
        assert len(learner._score._programs) == (prepared and scored)
        results.append([])
        for divisor in (1, 2):
            samples = samples_of_length(learner.config, divisor)
            learner.compile_step(samples)
            results[-1].append(update(learner, samples, score_old=scored))
            assert learner._step.late == (0 if prepared else divisor)
            assert (learner._score.late > 0) == (scored and (divisor == 2 or not prepared))
        learner.close()
    assert results[0] == results[1]
    assert "in vain" not in caplog.text


def test_nothing_is_compiled_ahead_for_packed_rows_of_unknown_lengths():
    parallel = ParallelConfig(compile_ahead=True)
    learner = learner_of(make_model(), 4, parallel=parallel, batching=BatchingConfig(pack=True))
    learner.keep_reference()
    learner.compile_ahead()
    assert not learner._step._programs
    samples = make_samples(learner.config.rollout_samples)
    learner.compile_step(samples)
    update(learner, samples)
    assert learner._step.late == 0
    learner.close()


def test_a_run_compiles_its_step_before_it_scores(tmp_path, monkeypatch):
    """In the order that is trained, before the audit's scores; and leaves nothing to compile behind."""
    config = tiny_config(
        tmp_path, parallel=ParallelConfig(compile_ahead=True), steps_per_generation=2, num_iterations=1, max_steps=2
    )
    trainer, events = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS[:8]), []
    learner = trainer.learner

    def noted(name, method):
        def called(samples, **settings):
            events.append((name, [(tuple(s.prompt_ids), tuple(s.response_ids)) for s in samples]))
            return method(samples, **settings)

        monkeypatch.setattr(learner, name, called)

    noted("compile_step", learner.compile_step)
    noted("prepare", learner.prepare)
    made, make_rows = [], learner_module.make_rows
    monkeypatch.setattr(learner_module, "make_rows", lambda c, samples: made.append(samples) or make_rows(c, samples))
    trainer.train()
    step, audited, trained = events
    assert [name for name, _ in events] == ["compile_step", "prepare", "prepare"]
    assert step[1] == trained[1] != audited[1]
    # Of the longest samples, of those that the step is compiled for and trains, and of the audit's: each laid out once.
    assert len(made) == 3
    lengths = {(len(sample.prompt_ids), len(sample.response_ids)) for sample in made[0]}
    assert lengths == {(config.max_prompt_length, config.max_completion_length)}
    assert learner._step._pool is None
    trainer.close()


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


@pytest.mark.parametrize(("limit", "grows", "most"), [((32, 64), True, 9), ((128, 128), False, 12)], ids=str)
def test_ragged_lengths_compile_few_programs(tmp_path, caplog, monkeypatch, limit, grows, most):
    """Prompts and completions of one token up to their limits: few lengths, each compiled once.

    Counted is what is asked of the compiler, whether or not its cache has it. Caches of one length, and an engine with
    a copy of its own of the kernels, are a GPU's: there are never more than 12 then. Prompts have three lengths,
    rows four.
    """
    if not grows:
        monkeypatch.setattr(Decoder, "reads_whole_caches", lambda self, length: False)
        monkeypatch.setattr(programs, "joins_kernels", lambda mesh: True)
    rng = random.Random(0)
    digits_of = [int(limit[0] ** rng.uniform(0, 0.98)) for _ in range(48)]
    rows = [{"prompt": "".join(rng.choices("0123456789", k=n)) + "=", "answer": "1"} for n in digits_of]
    config = tiny_config(
        tmp_path,
        # A size of its own: no other test's programs are found.
        model=dataclasses.replace(MODEL, scratch=SCRATCH | {"hidden_size": 24, "max_position_embeddings": 256}),
        max_prompt_length=limit[0],
        max_completion_length=limit[1],
        max_steps=12,
    )
    jax.clear_caches()
    programs.programs_of.cache_clear()

    def asked() -> list[str]:
        found = (re.match(r"Finished XLA compilation of jit\((\w+)\)", r.getMessage()) for r in caplog.records)
        return [match[1] for match in found if match]

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
    assert most - 3 < len(by_rollout[-1]) <= most
    for program in ("_begin_impl", "_admit_impl", "_decode_impl", "score", "_assign"):
        assert by_rollout[-1].count(program) == 1, program
    trainer.close()
