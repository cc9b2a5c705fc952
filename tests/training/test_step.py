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
from jaxrft.config import AuditConfig, RLConfig
from jaxrft.models.decoder import Decoder
from jaxrft.models.logprobs import CHUNK_ELEMENTS
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import make_mesh
from jaxrft.rollout import NativeEngine
from jaxrft.training import AuditError
from jaxrft.training.audit import Audit
from jaxrft.training.batch import Sample
from jaxrft.training.forward import response_logprobs
from jaxrft.training.learner import UNBOUNDED, Learner
from jaxrft.training.parts import build_recipe


def make_model(vocab=37):
    spec = DecoderSpec(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=512,
        tie_embeddings=True,
        init_stddev=0.3,
    )
    return Decoder(spec, rngs=nnx.Rngs(0))


def make_learner(rows, parts=1, vocab=37, **changes):
    """The epsilon makes AdamW's steps near to the gradient: signs of tiny gradients are rounding."""
    settings = {
        "learning_rate": 1.0,
        "adam_epsilon": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "loss_type": "grpo",
        "num_generations": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": parts,
        "max_completion_length": 12,
        "temperature": 0.8,
    }
    config = RLConfig(**settings | changes)
    mesh = make_mesh(config.parallel.replica)
    return Learner(config, build_recipe(config), make_model(vocab), mesh, total_steps=10)


def make_samples(count, seed=0, longest=12, vocab=37):
    """Ragged samples, each third of them not trained."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        prompt, size = rng.integers(0, vocab, rng.integers(1, 5)).tolist(), int(rng.integers(1, longest + 1))
        samples.append(
            Sample(
                prompt_ids=prompt,
                response_ids=rng.integers(0, vocab, size).tolist(),
                logprobs=rng.normal(-3, 1, size),
                advantage=float(rng.normal()),
                trained=number % 3 != 2,
            )
        )
    return samples


def update(learner, samples, score_old=True):
    return list(learner.update(learner.prepare(samples, score_old=score_old), 99, None))


def host(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def bit_equal(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(host(a), host(b), strict=True))


def difference(a, b, start):
    """How far two runs' changes of ``start`` are apart, relative to the change."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (a, b, start)]
    change = np.linalg.norm(flat[0] - flat[2])
    assert change > 1e-3
    return np.linalg.norm(flat[0] - flat[1]) / change


# ------------------------------------------------------------------ memory


def shapes_in(lowered):
    return {tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+\w+)>", lowered.as_text())}


def test_no_training_program_holds_the_logits_of_all_tokens():
    vocab = 50021
    chunk = CHUNK_ELEMENTS // vocab
    learner = make_learner(rows=4, parts=2, vocab=vocab)
    samples = [dataclasses.replace(s, response_ids=[1] * 190, logprobs=np.zeros(190)) for s in make_samples(8)]
    batch = learner.prepare(samples, score_old=False)
    tokens = batch.mask[0].size
    assert tokens > 2 * chunk, "several chunks are needed"
    model = nnx.merge(learner.graphdef, learner.state.params)
    full = jax.jit(lambda tokens: model(tokens)).lower(batch.tokens[0])
    assert max(math.prod(s) for s in shapes_in(full)) >= tokens * vocab, "a program with full logits is noticed"
    programs = {
        "step": learner._step.lower(learner.state, batch, UNBOUNDED),
        "score": learner._score.lower(learner.state.params, batch),
    }
    for name, program in programs.items():
        shapes = shapes_in(program)
        rows = {math.prod(shape) // vocab for shape in shapes if vocab in shape}
        assert max(rows) == chunk, name
        assert max(map(math.prod, shapes)) <= chunk * vocab, name


def live_buffers(shape):
    gc.collect()
    arrays = [a for a in jax.live_arrays() if a.shape == shape]
    return len({a.unsafe_buffer_pointer() for a in arrays})


def test_a_step_takes_the_old_state_and_leaves_one_copy_of_the_new():
    vocab = 41  # a shape that no other test has
    learner = make_learner(rows=4, vocab=vocab, beta=0.1)
    learner.publish()
    engine = NativeEngine(learner.model, max_slots=2, max_length=16, eos_token_ids=[0])
    state_only, with_reference = 3, 4  # parameters and two moments
    assert live_buffers((vocab, 16)) == state_only
    learner.keep_reference()
    samples = make_samples(4, vocab=vocab)
    for number in range(2):
        assert live_buffers((vocab, 16)) == with_reference
        old = jax.tree.leaves(learner.state)
        update(learner, samples)
        assert all(leaf.is_deleted() for leaf in old)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(learner.reference))
        learner.publish()
        engine.update_weights(learner.state.params, number)
    embedding = learner.model.embed.embedding[...]
    assert embedding.unsafe_buffer_pointer() == learner.state.params["embed"]["embedding"][...].unsafe_buffer_pointer()


# ------------------------------------------------------------------ steps that change nothing


@pytest.mark.parametrize("advantage", [np.inf, np.nan, 3e38])
def test_a_step_that_is_not_finite_is_skipped_and_counted(advantage):
    learner, clean = make_learner(rows=4, parts=2), make_learner(rows=4, parts=2)
    good, later = make_samples(8), make_samples(8, seed=1)
    bad = [*good[:6], dataclasses.replace(good[6], advantage=advantage), good[7]]
    assert bad[6].trained
    for either in (learner, clean):
        (stats,) = update(either, good)
        assert stats["skipped_steps"] == 0
    before = host((learner.state.params, learner.state.opt_state))
    (stats,) = update(learner, bad)
    assert stats["skipped_steps"] == 1
    assert bit_equal(before, (learner.state.params, learner.state.opt_state))
    assert (learner.step, int(learner.state.skipped)) == (2, 1)
    (stats,) = update(learner, later)
    update(clean, later)
    assert stats["skipped_steps"] == 1
    assert bit_equal(learner.state.params, clean.state.params)
    assert bit_equal(learner.state.opt_state, clean.state.opt_state)
    assert not bit_equal(before[: len(host(clean.state.params))], clean.state.params)


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
    learner = make_learner(rows=6)
    batch = learner.prepare(make_samples(6), score_old=True)
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
        learner = make_learner(8 // parts, parts, beta=0.1, num_iterations=2, epsilon=0.02, weight_decay=0.1)
        learner.keep_reference()
        start = host(learner.state.params)
        stats = update(learner, make_samples(8))
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
    """Whatever it holds; a long one pads all others to longer buckets."""
    samples = [s for s in make_samples(9) if s.trained][:5]
    idle = Sample(
        prompt_ids=[5] * prompt,
        response_ids=[7] * response,
        logprobs=np.full(response, -np.inf),
        advantage=math.nan,
        trained=False,
    )
    without, with_idle = make_learner(rows=5, beta=0.1), make_learner(rows=6, beta=0.1)
    start = host(without.state.params)
    without.keep_reference()
    with_idle.keep_reference()
    (expected,) = update(without, samples)
    (stats,) = update(with_idle, [*samples[:2], idle, *samples[2:]])
    assert difference(host(without.state.params), host(with_idle.state.params), start) < 1e-6
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_batch_without_trained_samples_is_finite():
    learner = make_learner(rows=2)
    (stats,) = update(learner, [dataclasses.replace(s, trained=False) for s in make_samples(2)])
    assert all(map(math.isfinite, stats.values()))
    assert stats["grad_norm"] == stats["loss"] == stats["skipped_steps"] == 0


def test_a_rollout_ends_in_its_middle_where_the_run_does():
    """Steps of the first pass over the rollout, in order, until the limit."""
    settings = {"steps_per_generation": 3, "num_iterations": 2}
    limited, single = make_learner(rows=2, **settings), make_learner(rows=2)
    samples = make_samples(6)
    batch = limited.prepare(samples, score_old=True)
    stats = list(limited.update(batch, 4, None))
    assert [s["learning_rate"] for s in stats] == [1.0] * 4
    assert limited.step == 4
    for start in (0, 2, 4, 0):
        update_of = single.prepare(samples, score_old=False)
        part = jax.tree.map(lambda a, s=start // 2: a[s : s + 1], batch)
        single.state, _ = single._step(single.state, part, UNBOUNDED)
        del update_of
    assert bit_equal(limited.state, single.state)


EIGHT_DEVICES = """
import json
import jax
from tests.training.test_step import *

def train(replica):
    learner = make_learner(8 // replica, 2, beta=0.1, parallel=ParallelConfig(replica=replica))
    learner.keep_reference()
    stats = [s for seed in range(3) for s in update(learner, make_samples(16, seed))]
    assert all(len(p.sharding.device_set) == replica and p.is_fully_replicated for p in jax.tree.leaves(learner.state))
    return host(learner.state.params), stats, learner._step._cache_size()

start = host(make_learner(8).state.params)
one, eight = train(1), train(8)
gaps = [abs(a[k] - b[k]) / (1e-3 + abs(a[k])) for a, b in zip(one[1], eight[1], strict=True) for k in a]
print(json.dumps({"params": difference(one[0], eight[0], start), "stats": max(gaps), "programs": [one[2], eight[2]]}))
"""


def test_eight_devices_are_one(run_python):
    result = json.loads(run_python(EIGHT_DEVICES, devices=8).stdout.splitlines()[-1])
    assert result["params"] < 1e-5
    assert result["stats"] < 1e-4
    assert result["programs"] == [1, 1], "one program for all updates"


# ------------------------------------------------------------------ log-probabilities of responses


def test_response_logprobs_are_the_models_at_the_places_of_the_response():
    model, rng = make_model(), np.random.default_rng(2)
    prompts, sizes = np.array([1, 4, 2, 1, 3]), np.array([6, 1, 5, 1, 4])
    lengths, longest = prompts + sizes, 7
    tokens = rng.integers(0, 37, (5, longest)).astype(np.int32)
    temperature = rng.uniform(0.3, 2.0, (5, 8)).astype(np.float32)
    logprobs, entropy = map(np.asarray, response_logprobs(model, tokens, prompts, lengths, temperature))
    logits = np.asarray(model(tokens, lengths), np.float64)
    by_place = np.ones((5, longest - 1), np.float32)
    for row, (prompt, size) in enumerate(zip(prompts, sizes)):
        by_place[row, prompt - 1 : prompt - 1 + size] = temperature[row, :size]
    whole, whole_entropy = map(np.asarray, models.token_logprobs(model, tokens, lengths, temperature=by_place))
    for row, (prompt, size) in enumerate(zip(prompts, sizes)):
        places = slice(prompt - 1, prompt - 1 + size)
        np.testing.assert_allclose(logprobs[row, :size], whole[row, places], atol=1e-6)
        np.testing.assert_allclose(entropy[row, :size], whole_entropy[row, places], atol=1e-6)
        assert not logprobs[row, size:].any()
        assert not entropy[row, size:].any()
        for t in range(size):
            scaled = logits[row, prompt - 1 + t] / temperature[row, t]
            log_p = scaled - scaled.max() - np.log(np.sum(np.exp(scaled - scaled.max())))
            np.testing.assert_allclose(logprobs[row, t], log_p[tokens[row, prompt + t]], atol=1e-5)
            np.testing.assert_allclose(entropy[row, t], -np.sum(np.exp(log_p) * log_p), atol=1e-5)
