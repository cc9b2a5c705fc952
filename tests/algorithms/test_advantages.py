"""Advantages of samples against their definitions in NumPy."""

import itertools

import jax
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference

BASELINES = ["mean", "leave_one_out", "length", "greedy", "batch_mean", "none"]
SCALES = ["std", "batch_std", "mean", "none"]
CHOICES = list(itertools.product(BASELINES, SCALES))

# Shuffled groups of 1, 2, 3 and 6 samples, and one that is empty.
GROUPS = np.array([3, 0, 4, 3, 1, 4, 3, 4, 1, 3, 3, 3])
LENGTHS = np.array([5, 2, 9, 1, 4, 4, 30, 7, 1, 2, 8, 3], np.float32)
GREEDY = np.array([0.5, -0.2, 0.1, np.nan, 0.7], np.float32)

jitted = jax.jit(alg.group_advantages, static_argnames=("num_groups", "baseline", "scale", "eps"))


def advantages(rewards, baseline, scale, greedy=GREEDY):
    others = {"length": {"lengths": LENGTHS}, "greedy": {"greedy_rewards": greedy}}.get(baseline, {})
    ours = jitted(rewards, GROUPS, 5, baseline=baseline, scale=scale, **others)
    return np.asarray(ours), reference.group_advantages(rewards, GROUPS, baseline, scale, **others)


def by_a_small_mean(rewards):
    """Whether a group's mean is a small difference, which float32 rounds away."""
    known = ~np.isnan(rewards)
    means = [np.mean(rewards[known & (group == GROUPS)]) for group in set(GROUPS[known])]
    return any(0 < abs(mean) < 0.05 * np.nanmax(np.abs(rewards)) for mean in means)


def draws(rng):
    yield rng.normal(size=12)
    yield rng.integers(0, 2, 12)  # Equal groups are common.
    yield 1000 + rng.normal(size=12)  # A large common part.
    yield np.where(rng.random(12) < 0.3, np.nan, rng.choice([0.1, 0.7], 12))
    yield rng.normal(size=12) * 1e-5
    yield rng.normal(size=12) * 1e6
    yield -rng.random(12)  # No mean above 0.
    yield np.where(GROUPS == 3, np.nan, rng.normal(size=12))


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_equals_the_definition(baseline, scale):
    rng = np.random.default_rng(CHOICES.index((baseline, scale)))
    compared = 0
    for draw in itertools.chain(draws(rng), draws(rng), draws(rng)):
        rewards = draw.astype(np.float32)
        if scale == "mean" and by_a_small_mean(rewards):
            continue
        # Greedy rewards of the size of the others: a difference of large numbers is exact in float32.
        ours, expected = advantages(rewards, baseline, scale, np.float32(GREEDY + np.nanmedian(rewards)))
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5, err_msg=str(rewards))
        compared += np.any(expected)
    assert compared > 8


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length"])
def test_equal_rewards_and_groups_of_one_are_exactly_zero(baseline, scale):
    """Also where the mean of equal numbers rounds, as that of many times 0.1 does."""
    ids = np.repeat(np.arange(5), [1, 3, 7, 10, 2])
    lengths = {"lengths": np.arange(1, 24, dtype=np.float32)} if baseline == "length" else {}
    for value in (0.1, 0.3, 1 / 3, -7.7, 1e6 + 0.1, 0.0):
        rewards = np.append(np.full(21, value), [2.0, 3.0]).astype(np.float32)
        result = np.asarray(jitted(rewards, ids, 5, baseline=baseline, scale=scale, **lengths))
        assert np.all(result[:21] == 0)
        assert result[-1] > 0 > result[-2]
        rewards[-2:] = value
        assert not np.any(jitted(rewards, ids, 5, baseline=baseline, scale=scale, **lengths))


@pytest.mark.parametrize("baseline", BASELINES)
def test_samples_without_a_reward_count_nowhere(baseline):
    """All of group 0, half of group 1, parts of groups 3 and 4: as if they were not there."""
    rewards = np.random.default_rng(2).normal(size=12).astype(np.float32)
    missing = np.array([0, 1, 4, 5])
    rewards[missing] = np.nan
    kept = ~np.isnan(rewards)
    for scale in ("std", "batch_std"):
        result, _ = advantages(rewards, baseline, scale)
        assert np.all(result[missing] == 0)
        others = {"length": {"lengths": LENGTHS[kept]}, "greedy": {"greedy_rewards": GREEDY}}.get(baseline, {})
        alone = jitted(rewards[kept], GROUPS[kept], 5, baseline=baseline, scale=scale, **others)
        np.testing.assert_allclose(result[kept], alone, rtol=1e-5)
        nothing, _ = advantages(np.full(12, np.nan, np.float32), baseline, scale)
        assert np.all(nothing == 0)


def test_leave_one_out_is_the_mean_baseline_times_n_over_n_minus_1():
    rewards = np.random.default_rng(3).normal(size=12).astype(np.float32)
    sizes = np.bincount(GROUPS)[GROUPS]
    mean, others = (advantages(rewards, baseline, "none")[0] for baseline in ("mean", "leave_one_out"))
    np.testing.assert_allclose(others, mean * sizes / np.maximum(sizes - 1, 1), rtol=1e-5, atol=1e-7)


def test_the_baseline_by_length_leaves_no_pull_on_the_length():
    """Advantages weighted by length add up to 0 in every group; of equal lengths it is the mean."""
    rewards = np.random.default_rng(4).normal(size=12).astype(np.float32)
    result, _ = advantages(rewards, "length", "none")
    np.testing.assert_allclose(np.bincount(GROUPS, LENGTHS * result), 0, atol=1e-4)
    equal = jitted(rewards, GROUPS, 5, baseline="length", scale="none", lengths=np.full(12, 7, np.float32))
    np.testing.assert_allclose(equal, advantages(rewards, "mean", "none")[0], rtol=1e-5, atol=1e-6)


def test_the_spread_of_a_group_or_of_the_batch_is_1():
    rewards = np.random.default_rng(4).normal(size=12).astype(np.float32) * 50
    by_group, _ = advantages(rewards, "mean", "std")
    for group in (1, 3, 4):
        assert by_group[group == GROUPS].std(ddof=1) == pytest.approx(1, rel=1e-5)
    for baseline in ("none", "batch_mean"):
        assert advantages(rewards, baseline, "batch_std")[0].std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_rewards_of_0_and_1_by_their_mean_weigh_prompts_by_their_failures():
    """MaxRL: a success among n has the advantage (1 - p) / p, and nobody has any where all fail."""
    rewards, ids = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0], np.float32), np.repeat([0, 1, 2], [4, 4, 2])
    result = jitted(rewards, ids, 3, scale="mean", eps=0.0)
    np.testing.assert_allclose(result, [3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1, 0, 0], rtol=1e-6)


def test_other_samples_do_not_matter_and_order_does_not():
    rng = np.random.default_rng(5)
    rewards, order = rng.normal(size=12).astype(np.float32), rng.permutation(12)
    result, _ = advantages(rewards, "mean", "std")
    shuffled = jitted(rewards[order], GROUPS[order], 5, baseline="mean", scale="std")
    np.testing.assert_allclose(shuffled, result[order], rtol=1e-5)
    changed = np.where(GROUPS == 4, rewards, rewards * 3 + 1).astype(np.float32)
    np.testing.assert_array_equal(advantages(changed, "mean", "std")[0][GROUPS == 4], result[GROUPS == 4])


@pytest.mark.parametrize(("baseline", "scale"), [("mean", "std"), ("leave_one_out", "none"), ("mean", "batch_std")])
def test_rewards_are_normalised_one_by_one_and_then_added(baseline, scale):
    """The scale of one does not drown the other; one that is missing counts 0, the other still counts."""
    rng = np.random.default_rng(6)
    components = (rng.normal(size=(12, 3)) * [1, 100, 1e-2]).astype(np.float32)
    components[[2, 7], 0] = np.nan
    components[:, 2] = np.where(GROUPS == 3, 0.25, components[:, 2])
    weights = np.array([1.0, 0.5, -2.0], np.float32)
    multi = jax.jit(alg.multi_reward_advantages, static_argnums=(3, 4, 5))
    result = multi(components, weights, GROUPS, 5, baseline, scale)
    expected = reference.multi_reward_advantages(components, weights, GROUPS, baseline, scale)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-5)
    single = multi(components[:, :1], np.ones(1, np.float32), GROUPS, 5, baseline, scale)
    np.testing.assert_allclose(single, advantages(components[:, 0], baseline, scale)[0], rtol=1e-5, atol=1e-6)


def test_informative_weight():
    """Samples over those of them whose group has something to say."""
    binary = np.array([1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1], np.float32)  # Groups 3 (of six) differs alone.
    rng = np.random.default_rng(7)
    weight = jax.jit(alg.informative_weight, static_argnums=(2, 3))
    cases = [binary, np.zeros(12), rng.normal(size=12), rng.integers(0, 2, 12), np.where(GROUPS == 3, np.nan, binary)]
    cases += [np.full(12, np.nan), np.where(rng.random(12) < 0.3, np.nan, rng.integers(0, 2, 12))]
    for rewards in (np.asarray(case, np.float32) for case in cases):
        for cap in (None, 1.5):
            expected = reference.informative_weight(rewards, GROUPS, cap)
            np.testing.assert_allclose(weight(rewards, GROUPS, 5, cap), expected, rtol=1e-6)
    assert float(weight(binary, GROUPS, 5, None)) == 2.0
    assert float(weight(binary, GROUPS, 5, 1.5)) == 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baseline": "man"}, "baseline: got 'man'.*did you mean mean"),
        ({"scale": "group"}, "scale: got 'group'"),
        ({"baseline": "length"}, "lengths"),
        ({"baseline": "greedy"}, "greedy_rewards"),
    ],
)
def test_what_is_unknown_or_missing(fields, message):
    with pytest.raises(ValueError, match=message):
        alg.group_advantages(np.zeros(2), np.zeros(2, int), 1, **fields)
