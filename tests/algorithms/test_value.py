"""The critic's loss against its formula."""

import functools

import jax
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference

SHAPE = (4, 5)


@functools.partial(jax.jit, static_argnames=("clip", "reduction"))
def evaluate(values, old, returns, mask, whole=None, *, clip, reduction):
    loss = functools.partial(alg.value_loss, clip=clip, reduction=reduction, whole=whole)
    return jax.value_and_grad(loss, has_aux=True)(values, old, returns, mask)


def random_case(seed, moved=0.4):
    rng = np.random.default_rng(seed)
    old, step, returns = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    values = old + np.float32(moved) * step
    mask = (rng.random(SHAPE) < 0.7).astype(np.float32)
    mask[2] = 0
    for array in (values, old, returns):
        array[mask == 0] = rng.choice([np.nan, np.inf, -1e30], size=int((mask == 0).sum()))
    return values, old, returns, mask


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("clip", [0.2, 0.5, None])
def test_equals_the_formula(clip, reduction):
    compared = 0
    for seed in range(12):
        case = random_case(seed, moved=0.0 if seed == 0 else 0.4)
        expected, slopes, margin = reference.value_loss(*case, clip, reduction)
        if margin < 1e-5:
            continue
        (loss, stats), gradient = evaluate(*case, clip=clip, reduction=reduction)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
        assert all(np.isfinite(value) for value in stats.values())
        compared += 1
    assert compared > 8


def test_a_value_that_overshoots_its_return_is_pulled_back():
    """A value that has moved too far towards its return has no gradient; one that moved away keeps it."""
    old, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    values, returns = np.float32([[0.5, 0.5, -0.5, 0.1]]), np.float32([[2.0, -1.0, -3.0, 2.0]])
    _, gradient = evaluate(values, old, returns, ones, clip=0.2, reduction="token_mean")
    np.testing.assert_allclose(gradient, [[0, 1.5 / 4, 0, -1.9 / 4]], rtol=1e-6)


def test_all_masked():
    values, old, returns, mask = random_case(1)
    (loss, stats), gradient = evaluate(values * np.nan, old, returns, 0 * mask, clip=0.2, reduction="sequence_mean")
    assert loss == 0
    assert not np.any(gradient)
    assert all(np.isfinite(value) for value in stats.values())


def test_parts_add_up_to_the_whole():
    case = random_case(2)
    whole, total = alg.totals(case[3]), evaluate(*case, clip=0.2, reduction="sequence_mean")
    rows = [evaluate(*(a[row : row + 1] for a in case), whole, clip=0.2, reduction="sequence_mean") for row in range(4)]
    np.testing.assert_allclose(sum(row[0][0] for row in rows), total[0][0], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([row[1] for row in rows]), total[1], rtol=1e-5)


def test_no_gradient_but_through_values():
    values, old, returns, mask = (np.nan_to_num(a, posinf=0, neginf=0).clip(-9, 9) for a in random_case(3))

    def loss(v, tied):
        moved = tied * (v - values)
        return alg.value_loss(v, old + moved, returns + moved, mask)[0]

    slope = jax.jit(jax.grad(loss))
    free, tied = (slope(values, number) for number in (0.0, 1.0))
    np.testing.assert_array_equal(tied, free)
    assert np.any(free)
