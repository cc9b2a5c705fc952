"""Returns, generalised advantages and whitening over masks with holes."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrft import algorithms as alg
from tests.algorithms import reference

SHAPE = (5, 7)
gae = jax.jit(alg.gae)
token_returns = jax.jit(alg.token_returns)
whiten = jax.jit(alg.whiten, static_argnames=("shift_mean", "eps"))


def case_of(seed, shape=SHAPE):
    """Rewards and values with garbage where the mask has its holes; a full row, an empty one, holes at both ends."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    mask[0], mask[-1] = 1, 0
    mask[1, 0] = mask[1, -1] = 0
    for array in (rewards, values):
        array[mask == 0] = rng.choice([np.nan, np.inf, -np.inf, 1e30], size=int((mask == 0).sum()))
    return rewards, values, mask


@pytest.mark.parametrize("gamma", [1.0, 1, 0.9, 0.0])
def test_returns_are_sums_over_what_is_valid(gamma):
    """By a loop, and where a discount of 1 is known when the program is made, by a sum."""
    rewards, _, mask = case_of(0)
    expected = reference.token_returns(rewards, mask, gamma)
    for function in (token_returns, jax.jit(alg.token_returns, static_argnums=2)):
        np.testing.assert_allclose(function(rewards, mask, gamma), expected, rtol=1e-5, atol=1e-6)
    loops = str(jax.make_jaxpr(alg.token_returns, static_argnums=2)(rewards, mask, gamma)).count("scan[")
    assert loops == (gamma != 1)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum_of_errors(gamma, lam):
    for seed in (1, 2):
        rewards, values, mask = case_of(seed)
        ours = gae(rewards, values, mask, gamma, lam)
        for array, expected in zip(ours, reference.gae(rewards, values, mask, gamma, lam)):
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


def test_each_row_may_have_its_lambda():
    rewards, values, mask = case_of(3)
    lam = np.array([0.0, 0.5, 0.9, 1.0, 0.3], np.float32)
    ours = gae(rewards, values, mask, 0.98, lam)
    for array, expected in zip(ours, reference.gae(rewards, values, mask, 0.98, lam)):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


def test_gae_between_its_two_ends():
    """lam 1: returns less values; lam 0: the one-step error. Without values it is the return itself."""
    rewards, values, mask = case_of(4)
    returns = np.asarray(token_returns(rewards, mask, 0.9))
    valid = np.where(mask > 0, values, 0)
    advantages, targets = gae(rewards, values, mask, 0.9, 1.0)
    np.testing.assert_allclose(advantages, returns - valid, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets, returns, rtol=1e-5, atol=1e-6)
    full, ones = np.where(mask > 0, rewards, 0)[:1], np.ones((1, 7), np.float32)
    error = full + 0.9 * np.append(values[:1, 1:], [[0.0]], axis=1) - values[:1]
    np.testing.assert_allclose(gae(full, values[:1], ones, 0.9, 0.0)[0], error, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gae(rewards, 0 * valid, mask, 0.9, 1.0)[0], returns, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.integers(0, 11), unique=True, min_size=1, max_size=7).map(sorted),
    numbers=hnp.arrays(np.float32, (2, 7), elements=st.floats(-10, 10, width=32)),
    garbage=st.sampled_from([np.nan, np.inf, -1e30, 0.0]),
)
def test_tokens_of_tools_are_as_if_they_were_not_there(places, numbers, garbage):
    """Wherever they stand, and whatever stands there: for returns, advantages and targets alike."""
    count = len(places)
    alone = numbers[:, None, :count]
    spread = np.full((2, 1, 12), garbage, np.float32)
    spread[:, 0, places] = numbers[:, :count]
    mask = np.zeros((1, 12), np.float32)
    mask[0, places] = 1
    packed = np.zeros((2, 1, 12), np.float32)
    packed[:, :, :count] = alone
    first = (np.arange(12) < count).astype(np.float32)[None]
    for function, arguments in ((gae, (spread[0], spread[1])), (token_returns, (spread[0],))):
        held = jax.tree.leaves(function(*arguments, mask, 0.9))
        pressed = jax.tree.leaves(function(*packed[: len(arguments)], first, 0.9))
        for ours, expected in zip(held, pressed):
            np.testing.assert_allclose(ours[0, places], expected[0, :count], rtol=1e-5, atol=1e-5)
            assert not np.any(np.delete(np.asarray(ours)[0], places))


def test_longer_responses_have_longer_credit():
    lengths = np.array([0, 1, 19, 20, 21, 40, 2000, 1e6], np.float32)
    for alpha in (0.05, 0.5):
        expected = reference.length_adaptive_lambda(lengths, alpha)
        np.testing.assert_allclose(alg.length_adaptive_lambda(lengths, alpha), expected, rtol=1e-5, atol=1e-6)
    assert float(alg.length_adaptive_lambda(np.float32([40.0]))[0]) == 0.5


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values(shift_mean):
    """Mean 0, unless it is kept, and variance 1, with n - 1, over what is valid."""
    for seed, offset, scale in [(5, 0, 1), (6, 3, 1e-2), (7, -100, 5), (8, 0, 1e-4)]:
        values, _, mask = case_of(seed)
        values = (offset + scale * values).astype(np.float32)
        result = np.asarray(whiten(values, mask, shift_mean=shift_mean))
        expected = reference.whiten(values, mask, shift_mean)
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-4)
        assert not np.any(result[mask == 0])
        if scale >= 1:
            kept = result[mask > 0].astype(np.float64)
            assert kept.var(ddof=1) == pytest.approx(1, rel=1e-4)
            assert kept.mean() == pytest.approx(0 if shift_mean else values[mask > 0].mean(), abs=1e-4)


def test_whitening_of_one_value_of_equal_ones_and_of_none():
    mask = np.zeros(SHAPE, np.float32)
    values = np.full(SHAPE, np.nan, np.float32)
    assert not np.any(whiten(values, mask))
    mask[2, 3], values[2, 3] = 1, 7
    assert not np.any(whiten(values, mask))
    np.testing.assert_allclose(whiten(values, mask, shift_mean=False), 7 * mask)
    assert np.all(np.abs(whiten(np.full(SHAPE, 0.1, np.float32), np.ones(SHAPE))) < 1e-2)
