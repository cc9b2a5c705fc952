"""The optimizer step: its memory, what it skips, how it accumulates, and what must not change it."""

import dataclasses
import gc
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft import models
from jaxrft.config import AlgorithmConfig, AuditConfig, BatchingConfig, ParallelConfig
from jaxrft.models.logit_chunks import logits_elements
from jaxrft.rollout import NativeEngine
from jaxrft.training import AuditError
from jaxrft.training.audit import Audit
from jaxrft.training.batch import Sample, make_batch
from jaxrft.training.forward import response_logprobs
from jaxrft.training.learner import UNBOUNDED
from tests.training.learners import VOCAB, bit_equal, difference, host, make_learner, make_model, make_samples, update

# ------------------------------------------------------------------ memory


def shapes_in(lowered):
    return {tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+\w+)>", lowered.as_text())}


def test_no_training_program_holds_the_logits_of_all_tokens():
    vocab = 50021
    learner = make_learner(rows=4, parts=2, vocab=vocab)
    samples = [dataclasses.replace(s, response_ids=[1] * 190, logprobs=np.zeros(190)) for s in make_samples(8)]
    batch = learner.prepare(samples, score_old=False)
    tokens = batch.places[0].size
    allowed = max(logits_elements(tokens, vocab), vocab * 16)  # a chunk of logits, or the projection's parameters
    assert tokens * vocab > 16 * allowed, "several chunks are needed"
    model = make_model(vocab)
    full = jax.jit(lambda tokens: model(tokens)).lower(batch.tokens[0])
    assert max(map(math.prod, shapes_in(full))) >= tokens * vocab, "a program with full logits is noticed"
    programs = {
        "step": learner._step.lower(learner.state, batch, UNBOUNDED, np.float32(0.1)),
        "score": learner._score.lower(learner.state.params, batch),
    }
    for name, program in programs.items():
        assert max(map(math.prod, shapes_in(program))) <= allowed, name


def live_buffers(shape):
    gc.collect()
    return len({a.unsafe_buffer_pointer() for a in jax.live_arrays() if a.shape == shape})


def count_copies():
    """Copies of the embedding between steps, its moments and the reference among them; in a process of its own."""
    learner = make_learner(8, 2)
    learner.publish()
    engine = NativeEngine(learner.model, max_slots=2, max_length=16, eos_token_ids=[0])
    counts = [live_buffers((VOCAB, 16))]
    for number in range(2):
        old = jax.tree.leaves(learner.state)
        update(learner, make_samples(16))
        assert all(leaf.is_deleted() for leaf in old)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(learner.reference))
        learner.publish()
        engine.update_weights(learner.state.params, number)
        counts.append(live_buffers((VOCAB, 16)))
    learner.reference = None
    return [*counts, live_buffers((VOCAB, 16))]


def train(replica, **changes):
    """Three updates over ``replica`` devices: parameters, statistics, number of programs compiled."""
    learner = make_learner(8 // replica, 2, parallel=ParallelConfig(replica=replica), **changes)
    stats = [step for seed in range(3) for step in update(learner, make_samples(16, seed))]
    for leaf in jax.tree.leaves(learner.state):
        assert len(leaf.sharding.device_set) == replica
        assert leaf.is_fully_replicated
    return host(learner.state.params), stats, learner._step.late


def scratch_memory(replica):
    """Bytes that one device needs beside the state in a step with more logits than one chunk holds."""
    learner = make_learner(8 // replica, vocab=50021, parallel=ParallelConfig(replica=replica))
    samples = [dataclasses.replace(s, response_ids=[1] * 96, logprobs=np.zeros(96)) for s in make_samples(8)]
    batch = learner.prepare(samples, score_old=False)
    return (
        learner._step.lower(learner.state, batch, UNBOUNDED, np.float32(0.1))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


# Its loss looks at all tokens of the batch, which lie on all devices.
SELECTING = AlgorithmConfig(
    objective="clip_cov",
    cov_share=0.3,
    cov_low=-9,
    entropy_share=0.4,
    correction="truncate",
    correction_level="sequence",
)
# One device has 4 rows in each of two micro-batches, eight devices have one row each in one.
PACKED = {"max_prompt_length": 4, "batching": BatchingConfig(pack=True, row_length=32), "algorithm": SELECTING}


def compare_devices(**changes):
    """Three updates on one device and on eight."""
    start = host(make_learner(8, 2).state.params)
    one, eight = train(1, **changes), train(8, **changes)
    # Ratios of exactly 1 in one program may be 1 + 1e-6 in another.
    pairs = [(a[k], b[k]) for a, b in zip(one[1], eight[1], strict=True) for k in a]
    gaps = [max(abs(a - b) - 2e-6, 0) / (1e-3 + abs(a)) for a, b in pairs]
    programs = [one[2], eight[2]]
    return {"params": difference(one[0], eight[0], start), "stats": max(gaps), "programs": programs}


OTHER_PROCESS = """
import json
from tests.training.test_step import PACKED, SELECTING, compare_devices, count_copies, scratch_memory
result = {"copies": count_copies(), **compare_devices(), "scratch": scratch_memory(8)}
result |= {"selecting": compare_devices(algorithm=SELECTING), "packed": compare_devices(**PACKED)}
print(json.dumps(result))
"""


def test_no_copies_are_kept_and_eight_devices_are_one_that_share_the_work(run_python):
    """What only a process of its own can tell: with no other arrays, and with eight devices."""
    result = json.loads(run_python(OTHER_PROCESS, devices=8).stdout.splitlines()[-1])
    assert result["copies"] == [4, 4, 4, 3], "parameters, two moments, the reference"
    for compared in (result, result["selecting"], result["packed"]):
        assert compared["params"] < 1e-5
        assert compared["stats"] < 1e-4
        if compared is not result["packed"]:
            assert compared["programs"] == [1, 1], "one program for all updates"
    assert result["scratch"] < 2**26, "less than the logits of one chunk: each device has an eighth of it"


# ------------------------------------------------------------------ steps that change nothing


@pytest.mark.parametrize("advantage", [np.inf, np.nan, 3e38])
def test_a_step_that_is_not_finite_is_skipped_and_counted(advantage):
    good, later = make_samples(8), make_samples(8, seed=1)
    bad = [*good[:6], dataclasses.replace(good[6], advantage=advantage), good[7]]
    assert bad[6].trained
    clean = make_learner(rows=4, parts=2)
    update(clean, good)
    update(clean, later)
    expected = host((clean.state.params, clean.state.opt_state))
    learner = make_learner(rows=4, parts=2)
    (stats,) = update(learner, good)
    assert stats["skipped_steps"] == 0
    before = host((learner.state.params, learner.state.opt_state))
    (stats,) = update(learner, bad)
    assert stats["skipped_steps"] == 1
    assert bit_equal(before, (learner.state.params, learner.state.opt_state))
    assert (learner.step, int(learner.state.skipped)) == (2, 1)
    (stats,) = update(learner, later)
    assert stats["skipped_steps"] == 1
    assert bit_equal(expected, (learner.state.params, learner.state.opt_state))
    assert not bit_equal(before, expected)


def test_a_skipped_step_counts_in_the_schedule():
    """The learning rate goes by steps made, AdamW's correction by steps that changed something."""
    learner = make_learner(rows=4, parts=2)
    bad = [dataclasses.replace(s, advantage=math.nan) for s in make_samples(8)]
    for _ in range(2):
        update(learner, bad)
    counts = [int(leaf) for leaf in jax.tree.leaves(learner.state.opt_state) if leaf.ndim == 0]
    assert (learner.step, int(learner.state.skipped), counts) == (2, 2, [0])


@pytest.mark.parametrize(
    ("dtype", "offset", "passes"),
    [
        ("float32", lambda mask: 1e-3 * mask, False),
        ("float32", lambda mask: np.where(np.arange(mask.size).reshape(mask.shape) == 0, 1e-3, 0), False),
        ("float32", lambda mask: np.nan * mask, False),
        ("float32", lambda mask: 0 * mask, True),
        ("bfloat16", lambda mask: 0.02 * mask, False),
        ("bfloat16", lambda mask: np.where(np.arange(mask.size).reshape(mask.shape) == 0, 0.05, 0), True),
    ],
    ids=["all", "one", "nan", "none", "bfloat16 all", "bfloat16 one"],
)
def test_the_audits_bounds(dtype, offset, passes):
    """Old log-probabilities that are not the policy's: nothing is trained, and it is an error."""
    learner = make_learner(rows=8)
    batch = learner.prepare(make_samples(8), score_old=True)
    shift = jnp.asarray(offset(np.asarray(batch.mask)), jnp.float32)
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs + shift)
    before = host((learner.state.params, learner.state.opt_state))
    updates = learner.update(batch, 99, Audit(AuditConfig(), dtype))
    if passes:
        assert len(list(updates)) == 1
    else:
        with pytest.raises(AuditError, match="before the first update"):
            next(updates)
        assert int(learner.state.skipped) == (1 if np.isnan(shift).any() else 0)
    assert bit_equal(before, (learner.state.params, learner.state.opt_state)) is not passes


# ------------------------------------------------------------------ what must not matter


def test_accumulation_is_one_large_batch():
    """Two passes, so that ratios, clipping and the KL count too."""
    results = {}
    for parts in (1, 2, 4, 8):
        learner = make_learner(8 // parts, parts)
        start = host(learner.state.params)
        batch = learner.prepare(make_samples(8), score_old=True)
        stats = [step for _ in range(2) for step in learner.update(batch, 99, None)]
        results[parts] = stats, host(learner.state.params)
    stats, params = results[1]
    assert stats[1]["ratio/deviation_max"] > 0.02
    assert stats[1]["clip_ratio/region_mean"] > 0
    assert stats[1]["kl"] > 0
    for parts in (2, 4, 8):
        assert difference(params, results[parts][1], start) < 1e-5
        for ours, whole in zip(results[parts][0], stats, strict=True):
            assert set(ours) == set(whole)
            for name, value in whole.items():
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("prompt", "response"), [(2, 3), (20, 40)], ids=["short", "longer than the others' bucket"])
def test_a_sample_that_is_not_trained_contributes_nothing(prompt, response):
    """Whatever it holds; a long one pads all others to longer buckets. A batch given twice has the batch's means."""
    samples = make_samples(4)
    idle = Sample(
        prompt_ids=[5] * prompt,
        response_ids=[7] * response,
        logprobs=np.full(response, -np.inf),
        advantage=math.nan,
        trained=False,
    )
    learner = make_learner(rows=8)
    start = host(learner.state.params)
    (expected,) = update(learner, [*samples, *samples])
    params = host(learner.state.params)
    learner = make_learner(rows=8)
    (stats,) = update(learner, [*samples[:2], *[idle] * 4, *samples[2:]])
    assert difference(params, host(learner.state.params), start) < 1e-6
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_batch_without_trained_samples_changes_nothing():
    """Not even by momentum and weight decay; the step is counted as skipped."""
    learner = make_learner(rows=8)
    update(learner, make_samples(8))
    before = host((learner.state.params, learner.state.opt_state))
    (stats,) = update(learner, [dataclasses.replace(s, trained=False) for s in make_samples(8)])
    assert all(map(math.isfinite, stats.values()))
    assert stats["grad_norm"] == stats["loss"] == 0
    assert stats["skipped_steps"] == 1
    assert bit_equal(before, (learner.state.params, learner.state.opt_state))


def test_the_samplers_log_probabilities_are_compared_and_change_nothing():
    """A token that the engine gives a probability of nearly 0 leaves all statistics finite."""
    samples = make_samples(8)
    learner = make_learner(rows=8)
    batch = learner.prepare(samples, score_old=True)
    old, mask = np.asarray(batch.old_logprobs)[0], np.asarray(batch.mask)[0] > 0
    gap = old[mask] - np.asarray(batch.sampler_logprobs)[0][mask]
    (stats,) = learner.update(batch, 99, None)
    assert stats["sampling/logprob_difference/mean"] == pytest.approx(np.abs(gap).mean(), rel=1e-5)
    assert stats["sampling/logprob_difference/max"] == pytest.approx(np.abs(gap).max(), rel=1e-5)
    assert stats["sampling/kl"] == pytest.approx(np.mean(np.exp(gap) - 1 - gap), rel=1e-4)
    expected = host(learner.state)
    learner = make_learner(rows=8)
    far = [dataclasses.replace(s, logprobs=np.full(len(s.response_ids), -1e4)) for s in samples]
    (stats,) = update(learner, far)
    assert all(map(math.isfinite, stats.values()))
    assert bit_equal(expected, learner.state)


def test_a_rollout_ends_in_its_middle_where_the_run_does(monkeypatch):
    """The first pass over the micro-batches in order, then the second as far as steps are left."""
    learner = make_learner(rows=4, parts=2)
    pieces = [learner.prepare(make_samples(8, seed), score_old=True) for seed in range(3)]
    batch = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *pieces)
    several = dataclasses.replace(learner.config, steps_per_generation=6, num_iterations=2)
    with monkeypatch.context() as patch:
        patch.setattr(learner, "config", several)
        assert len(list(learner.update(batch, 4, None))) == learner.step == 4
    ours = host(learner.state)
    learner = make_learner(rows=4, parts=2)
    for number in (0, 1, 2, 0):
        learner.state, _ = learner._step(learner.state, pieces[number], UNBOUNDED, np.float32(0.1))
    assert bit_equal(ours, learner.state)


def test_the_weight_of_the_kl_changes_without_a_new_program():
    learner = make_learner(rows=8)
    batch = learner.prepare(make_samples(8), score_old=True)
    drift = np.random.default_rng(1).normal(0, 1, batch.mask.shape).astype(np.float32)
    batch = dataclasses.replace(batch, ref_logprobs=batch.old_logprobs + drift)
    losses, params, programs = {}, {}, set()
    for weight in (None, 0.1, 0.4, 0.7):
        learner = make_learner(rows=8)
        (stats,) = learner.update(batch, 1, None, weight)
        losses[weight], params[weight] = stats["loss"], host(learner.state.params)
        programs.add(learner._step.late)
    assert len(programs) == 1
    assert losses[None] == losses[0.1], "the recipe's own"
    assert losses[0.4] - losses[0.1] > 0.01
    assert losses[0.7] - losses[0.4] == pytest.approx(losses[0.4] - losses[0.1], rel=1e-3)
    assert not bit_equal(params[0.1], params[0.7])


# ------------------------------------------------------------------ log-probabilities of responses


@pytest.mark.parametrize("pick", [True, False])
def test_response_logprobs_are_the_models_at_the_places_of_the_response(pick):
    model, rng = make_model(), np.random.default_rng(2)
    prompts, sizes = np.array([1, 4, 2, 1, 3]), np.array([6, 1, 5, 1, 4])
    lengths, longest = prompts + sizes, 7
    tokens = rng.integers(0, VOCAB, (5, longest)).astype(np.int32)
    samples = [
        Sample(prompt_ids=row[:prompt], response_ids=row[prompt : prompt + size], logprobs=np.zeros(size))
        for row, prompt, size in zip(tokens, prompts, sizes)
    ]
    part = jax.tree.map(lambda a: a[0], make_batch(samples, 5, temperature=1.0, pick=pick))
    temperature = rng.uniform(0.3, 2.0, part.sources.shape).astype(np.float32)
    np.put(part.temperature, part.sources[part.sources >= 0], temperature[part.sources >= 0])
    logprobs, entropy = map(np.asarray, nnx.jit(response_logprobs)(model, part))
    logits = np.asarray(model(tokens, lengths), np.float64)
    by_place = np.ones((5, longest - 1), np.float32)
    for row, (prompt, size) in enumerate(zip(prompts, sizes)):
        by_place[row, prompt - 1 : prompt - 1 + size] = temperature[row, :size]
    whole, whole_entropy = map(np.asarray, nnx.jit(models.token_logprobs)(model, tokens, lengths, by_place))
    for row, (prompt, size) in enumerate(zip(prompts, sizes)):
        places = slice(prompt - 1, prompt - 1 + size)
        np.testing.assert_allclose(logprobs[row, :size], whole[row, places], atol=5e-6)
        np.testing.assert_allclose(entropy[row, :size], whole_entropy[row, places], atol=5e-6)
        assert not logprobs[row, size:].any()
        assert not entropy[row, size:].any()
        for t in range(size):
            scaled = logits[row, prompt - 1 + t] / temperature[row, t]
            log_p = scaled - scaled.max() - np.log(np.sum(np.exp(scaled - scaled.max())))
            np.testing.assert_allclose(logprobs[row, t], log_p[tokens[row, prompt + t]], atol=1e-5)
            np.testing.assert_allclose(entropy[row, t], -np.sum(np.exp(log_p) * log_p), atol=1e-5)
