"""Objectives that look at a whole batch, corrections and whitening: however the batch is split, one update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft import algorithms as alg
from jaxrft.config import AlgorithmConfig, BatchingConfig, ConfigError, RLConfig
from jaxrft.training import parts
from jaxrft.training.credit import Credit
from tests.training.learners import difference, drawn_of, host, learner_of, make_samples


class Bag(nnx.Module):
    """A causal model of one layer, which compiles in a fraction of a decoder's time."""

    def __init__(self, vocab=37, width=8):
        self.embedding = nnx.Param(jax.random.normal(jax.random.key(0), (vocab, width)))
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(1), (width, vocab)))

    @property
    def output_kernel(self):
        return self.kernel[...]

    def hidden(self, tokens, lengths):
        seen = jnp.cumsum(self.embedding[...][tokens], axis=1)
        return jnp.tanh(seen / (1 + jnp.arange(tokens.shape[1]))[:, None])


# Between them: both scopes of the entropy share, both objectives that choose by covariance, the one that compares the
# samples of a group, every level of correction and both kinds.
CASES = {
    "clip_cov": {
        "objective": "clip_cov", "cov_share": 0.3, "cov_low": -9.0, "entropy_share": 0.4,
        "correction": "truncate", "correction_level": "geometric", "correction_high": 1.1, "sequence_mask": 0.01,
    },
    "kl_cov": {
        "objective": "kl_cov", "cov_share": 0.3, "correction": "mask", "correction_low": 0.7, "correction_high": 1.5,
        "reduction": "sequence_sum",
    },
    "gvpo": {
        "objective": "gvpo", "entropy_share": 0.4, "entropy_scope": "sequence",
        "correction": "truncate", "correction_level": "sequence", "correction_high": 1.5, "reduction": "sequence_mean",
    },
}  # fmt: skip
READS = {"clip_cov": "covariance/chosen_mean", "kl_cov": "covariance/chosen_mean", "gvpo": "entropy_share/kept_mean"}


def samples_of_groups():
    """Four groups of two; one sample of the second is not trained."""
    return [dataclasses.replace(s, group=i // 2, trained=i != 2) for i, s in enumerate(make_samples(8))]


def one_update(case, count):
    """Parameters before and after, and the statistics, of an update on old samples in ``count`` micro-batches."""
    settings = {"epsilon": None, "loss_type": None, "num_generations": 2, "algorithm": AlgorithmConfig(**CASES[case])}
    learner = learner_of(Bag(), 8 // count, count, **settings)
    learner.keep_reference()
    start = host(learner.state.params)
    batch = learner.prepare(samples_of_groups(), score_old=True)
    old, sampler = np.random.default_rng(1).normal(0, 0.3, (2, 8, batch.mask.shape[-1])).astype(np.float32)
    batch = dataclasses.replace(
        batch,
        old_logprobs=batch.old_logprobs + old.reshape(batch.mask.shape),
        sampler_logprobs=batch.old_logprobs + sampler.reshape(batch.mask.shape),
    )
    (stats,) = learner.update(batch, 1, None)
    return start, host(learner.state.params), stats


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_one_batch(case):
    start, whole, expected = one_update(case, 1)
    assert 0 < expected[READS[case]] < 1
    assert 0 < expected["correction/outside_mean"] < 1
    for count in (2, 4):
        _, params, stats = one_update(case, count)
        assert difference(params, whole, start) < 1e-5
        assert set(stats) == set(expected)
        for name, value in expected.items():
            assert stats[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_gvpo_refuses_groups_that_are_split_over_micro_batches():
    algorithm = AlgorithmConfig(objective="gvpo")
    fits = RLConfig(num_generations=4, per_device_train_batch_size=4, steps_per_generation=3, algorithm=algorithm)
    assert parts.build_recipe(fits).policy.grouped
    split = dataclasses.replace(fits, num_generations=8, steps_per_generation=4)
    message = r"^per_device_train_batch_size: got 4 completions in a micro-batch, takes a multiple of num_generations"
    with pytest.raises(ConfigError, match=message) as caught:
        parts.build_recipe(split)
    assert "\n" not in str(caught.value)
    parts.build_recipe(dataclasses.replace(split, algorithm=AlgorithmConfig(objective="cispo")))
    packed = dataclasses.replace(fits, batching=BatchingConfig(pack=True))
    with pytest.raises(ConfigError, match=r"^batching\.pack: set with objective gvpo"):
        parts.build_recipe(packed)


def test_a_kl_in_the_rewards_is_not_in_the_loss_too():
    samples = [dataclasses.replace(s, advantage=0.0) for s in samples_of_groups()]
    losses = {}
    for recipe in ("reinforce_pp", "reinforce_pp_baseline"):
        algorithm = AlgorithmConfig(recipe=recipe)
        learner = learner_of(Bag(), 8, epsilon=None, loss_type=None, num_generations=2, algorithm=algorithm)
        learner.keep_reference()
        assert learner.needs_reference
        batch = learner.prepare(samples, score_old=True)
        batch = dataclasses.replace(batch, ref_logprobs=batch.old_logprobs - 0.5)
        (stats,) = learner.update(batch, 1, None)
        losses[recipe] = stats["loss"], stats.get("kl")
    assert losses["reinforce_pp"] == (0.0, None)
    assert losses["reinforce_pp_baseline"] == (pytest.approx(0.1 * 0.125, rel=1e-4), pytest.approx(0.125, rel=1e-4))


@functools.cache
def advantages(count, order):
    """Whitened advantages of samples in an order, in ``count`` micro-batches; back in their first order."""
    recipe = alg.recipe("reinforce_pp").with_overrides({"kl_coef": 0.1, "gamma": 0.9})
    samples = samples_of_groups()
    learner = learner_of(Bag(), 8 // count, count, num_generations=2)
    learner.keep_reference()
    batch = learner.prepare([samples[i] for i in order], score_old=True)
    drift = np.random.default_rng(2).normal(0, 1, (8, batch.mask.shape[-1])).astype(np.float32)[list(order)]
    batch = dataclasses.replace(batch, ref_logprobs=batch.old_logprobs + drift.reshape(batch.mask.shape))
    rewards = np.random.default_rng(3).normal(size=8).astype(np.float32)
    given, kl = Credit(recipe, [1.0], 12).assign(batch, drawn_of(samples, rewards, 2), None, order)
    found = np.asarray(given.advantages).reshape(8, -1)
    return found[np.argsort(order)], np.asarray(batch.mask).reshape(8, -1)[np.argsort(order)], float(kl)


def test_whitening_is_over_all_micro_batches():
    expected, mask, kl = advantages(1, tuple(range(8)))
    trained = expected[mask > 0]
    np.testing.assert_allclose([trained.mean(), trained.std(ddof=1)], [0, 1], atol=1e-5)
    assert not expected[mask == 0].any()
    for count in (2, 4):
        found, _, same_kl = advantages(count, (5, 2, 7, 0, 1, 6, 3, 4))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert same_kl == pytest.approx(kl, rel=1e-5)
