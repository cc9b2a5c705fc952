"""Group advantages against their definitions in NumPy."""

import itertools

import jax
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference

BASELINES, SCALES = ["mean", "leave_one_out", "none"], ["std", "batch_std", "none"]
CHOICES = list(itertools.product(BASELINES, SCALES))

# Shuffled groups of 1, 2, 3 and 6 samples, and one that is empty.
GROUPS = np.array([3, 0, 4, 3, 1, 4, 3, 4, 1, 3, 3, 3])
advantages = jax.jit(alg.group_advantages, static_argnames=("num_groups", "baseline", "scale"))


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_equals_the_definition(baseline, scale):
    rng = np.random.default_rng(0)
    for draw in (
        rng.normal(size=12),
        rng.integers(0, 2, 12),  # equal groups are common
        1000 + rng.normal(size=12),  # a large common part
        np.where(rng.random(12) < 0.3, np.nan, rng.choice([0.1, 0.7], 12)),
        rng.normal(size=12) * 1e-5,
        rng.normal(size=12) * 1e6,
    ):
        rewards = draw.astype(np.float32)
        ours = advantages(rewards, GROUPS, 5, baseline=baseline, scale=scale)
        expected = reference.group_advantages(rewards, GROUPS, baseline, scale)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_and_groups_of_one_are_exactly_zero(baseline, scale):
    """Also where the mean of equal numbers rounds, as that of many times 0.1 does."""
    ids = np.repeat(np.arange(5), [1, 3, 7, 10, 2])
    for value in (0.1, 0.3, 1 / 3, -7.7, 1e6 + 0.1, 0.0):
        rewards = np.append(np.full(21, value), [2.0, 3.0]).astype(np.float32)
        result = np.asarray(advantages(rewards, ids, 5, baseline=baseline, scale=scale))
        assert np.all(result[:21] == 0)
        assert result[-1] == -result[-2] > 0
        rewards[-2:] = value
        assert not np.any(advantages(rewards, ids, 5, baseline=baseline, scale=scale))


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_samples_without_a_reward_count_nowhere(baseline, scale):
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=12).astype(np.float32)
    missing = np.array([0, 1, 4, 5])  # all of group 0, half of group 1, a part of groups 3 and 4
    rewards[missing] = np.nan
    result = np.asarray(advantages(rewards, GROUPS, 5, baseline=baseline, scale=scale))
    assert np.all(result[missing] == 0)
    kept = ~np.isnan(rewards)
    alone = alg.group_advantages(rewards[kept], GROUPS[kept], 5, baseline=baseline, scale=scale)
    np.testing.assert_allclose(result[kept], alone, rtol=1e-6)
    nothing = advantages(np.full(12, np.nan, np.float32), GROUPS, 5, baseline=baseline, scale=scale)
    assert np.all(np.asarray(nothing) == 0)


def test_leave_one_out_is_the_mean_baseline_times_n_over_n_minus_1():
    rewards = np.random.default_rng(3).normal(size=12).astype(np.float32)
    sizes = np.bincount(GROUPS)[GROUPS]
    mean, others = (advantages(rewards, GROUPS, 5, baseline=b, scale="none") for b in ("mean", "leave_one_out"))
    np.testing.assert_allclose(others, mean * sizes / np.maximum(sizes - 1, 1), rtol=1e-5)


def test_the_spread_of_a_group_or_of_the_batch_is_1():
    rewards = np.random.default_rng(4).normal(size=12).astype(np.float32) * 50
    by_group = np.asarray(advantages(rewards, GROUPS, 5, scale="std"))
    for group in (1, 3, 4):
        assert by_group[group == GROUPS].std(ddof=1) == pytest.approx(1, rel=1e-5)
    whole = np.asarray(advantages(rewards, GROUPS, 5, baseline="none", scale="batch_std"))
    assert whole.std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_other_samples_do_not_matter_and_order_does_not():
    rng = np.random.default_rng(5)
    rewards, order = rng.normal(size=12).astype(np.float32), rng.permutation(12)
    result = np.asarray(advantages(rewards, GROUPS, 5))
    np.testing.assert_allclose(advantages(rewards[order], GROUPS[order], 5), result[order], rtol=1e-5)
    changed = np.where(GROUPS == 4, rewards, rewards * 3 + 1).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(advantages(changed, GROUPS, 5))[GROUPS == 4], result[GROUPS == 4])


def test_unknown_names():
    rewards, ids = np.zeros(2), np.zeros(2, int)
    with pytest.raises(ValueError, match="baseline: got 'man', takes mean, leave_one_out or none; did you mean mean"):
        alg.group_advantages(rewards, ids, 1, baseline="man")
    with pytest.raises(ValueError, match="scale: got 'group', takes std, batch_std or none"):
        alg.group_advantages(rewards, ids, 1, scale="group")
