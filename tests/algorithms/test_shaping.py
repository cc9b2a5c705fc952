"""Penalties of length, running moments, and the controller of the KL."""

import functools

import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference


def test_overlong_penalty():
    """Nothing up to the buffer, then a straight line down to ``-factor`` at the longest."""
    lengths = np.array([0, 11, 12, 13, 14, 16, 20], np.float32)
    for factor in (1.0, 0.5):
        expected = [reference.overlong_penalty(n, 16, 4, factor) for n in lengths]
        np.testing.assert_allclose(alg.overlong_penalty(lengths, 16, 4, factor), expected, rtol=1e-6)
    np.testing.assert_allclose(alg.overlong_penalty(lengths, 16, 4)[:6], [0, 0, 0, -0.25, -0.5, -1])


def test_length_penalty():
    lengths = np.array([0, 5, 16], np.float32)
    expected = [reference.length_penalty(n, 16, 0.3) for n in lengths]
    np.testing.assert_allclose(alg.length_penalty(lengths, 16, 0.3), expected, rtol=1e-6)
    np.testing.assert_allclose(alg.length_penalty(lengths, 16, 0.3)[-1], -0.3, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_moments_do_not_hang_on_how_values_are_split(offset):
    """Also where the mean is large against the spread, and where a part is empty or has one value."""
    rng = np.random.default_rng(0)
    values = (offset + rng.normal(size=40)).astype(np.float32)
    values[rng.random(40) < 0.2] = np.nan
    known = values[~np.isnan(values)].astype(np.float64)
    for cuts in ([20], [0, 20, 39]):
        merged = functools.reduce(alg.merge_moments, map(alg.moments, np.split(values, cuts)))
        assert float(merged.count) == len(known)
        np.testing.assert_allclose(merged.mean, known.mean(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged.m2, np.square(known - known.mean()).sum(), rtol=1e-4)


def test_merging_with_nothing_is_nothing_new():
    some, none = alg.moments(np.float32([1, 2, 4])), alg.moments(np.float32([np.nan, np.nan]))
    for merged in (alg.merge_moments(some, none), alg.merge_moments(none, some)):
        np.testing.assert_allclose([merged.count, merged.mean, merged.m2], [3, 7 / 3, 14 / 3], rtol=1e-6)
    empty = alg.merge_moments(none, none)
    assert (float(empty.count), float(empty.m2)) == (0, 0)
    assert np.isfinite(empty.mean)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_standardized_values(shift_mean):
    """By the moments of others, which may have none to divide by: one value, equal values, none."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=9).astype(np.float32)
    for seen in (5 + 3 * rng.normal(size=30), [4.0], [2.0, 2.0], [], [1.0, 3.0, np.nan]):
        seen = np.asarray(seen, np.float32)
        result = alg.standardize(values, alg.moments(seen), shift_mean=shift_mean)
        np.testing.assert_allclose(result, reference.standardize(values, seen, shift_mean), rtol=1e-5, atol=1e-6)
    own = np.asarray(alg.standardize(values, alg.moments(values)))
    assert own.std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert own.mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e3 + 0.1])
def test_equal_values_have_no_spread_though_their_mean_rounds(value):
    """In whatever parts they were seen: nothing may be divided by what rounding left."""
    parts = [alg.moments(np.full(count, value, np.float32)) for count in (3, 7, 10, 1)]
    for seen in (parts[2], functools.reduce(alg.merge_moments, parts)):
        np.testing.assert_allclose(alg.standardize(np.float32([value + 1]), seen), [1.0], rtol=1e-3)
        np.testing.assert_allclose(alg.standardize(np.float32([value]), seen, shift_mean=False), [value], rtol=1e-6)


def test_the_kl_coefficient_follows_its_target_at_a_limited_pace():
    for observed in (0.0, 1.0, 1.7, 1.999, 2.0, 2.1, 2.5, 100.0):
        for count in (1, 64):
            expected = reference.adaptive_kl_coef(0.3, observed, 2.0, 1000, count)
            assert float(alg.adaptive_kl_coef(0.3, observed, 2.0, 1000, count)) == pytest.approx(expected, rel=1e-6)
    assert float(alg.adaptive_kl_coef(0.3, 4.0, 2.0, 1000, 100)) == pytest.approx(0.3 * 1.02)
    assert float(alg.adaptive_kl_coef(0.3, 0.0, 2.0, 1000, 100)) == pytest.approx(0.3 * 0.98)
