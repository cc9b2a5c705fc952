"""Loss scaling and stochastic rounding, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.parallel.loss_scale import LARGEST_SCALE, adjust, initial_loss_scale
from jaxrft.parallel.rounding import cast_like, stochastic_round


def test_the_scale_halves_at_each_overflow_and_doubles_after_a_while():
    scale, values = initial_loss_scale(8.0), []
    for finite in [True, True, False, False, True, True, True, True, True, True]:
        scale = adjust(scale, jnp.asarray(finite), 3)
        values.append(float(scale.value))
    assert values == [8, 8, 4, 2, 2, 2, 4, 4, 4, 8]
    assert int(scale.good_steps) == 0


@pytest.mark.parametrize(("start", "finite", "end"), [(1.0, False, 1.0), (LARGEST_SCALE, True, LARGEST_SCALE)])
def test_the_scale_has_bounds(start, finite, end):
    assert float(adjust(initial_loss_scale(start), jnp.asarray(finite), 1).value) == end


def test_rounding_is_to_a_neighbour_and_right_on_average():
    draws = 4000
    x = np.array([1.001, -1.001, 3.14159, 1e-30, -7e20, 0.0, 2.0], np.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    rounded = np.asarray(jax.vmap(lambda key: stochastic_round(key, jnp.asarray(x)))(keys)).astype(np.float64)
    # The neighbours: the upper half of the float32, cut off, and one unit of it further from 0.
    bits = x.view(np.uint32) & 0xFFFF0000
    low, high = bits.view(np.float32).astype(np.float64), (bits + 0x10000).view(np.float32).astype(np.float64)
    assert np.all((rounded == low) | (rounded == high))
    share = (x - low) / (high - low)
    found = (rounded == high).mean(0)
    assert np.all(np.abs(found - share) <= 4 * np.sqrt(share * (1 - share) / draws))
    # What bfloat16 holds exactly is never moved.
    assert np.all(rounded[:, -2:] == x[-2:])


def test_what_is_not_finite_stays():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    rounded = np.asarray(stochastic_round(jax.random.key(1), x)).astype(np.float32)
    np.testing.assert_array_equal(rounded, np.asarray(x))


def test_small_updates_add_up():
    """A thousand updates of 1/40 of a unit in the last place: rounding to the nearest loses each of them."""
    values, step, updates = np.full(2000, 1.0, np.float32), 2.0**-7 / 40, 1000

    def one(carry, key):
        stochastic, nearest = carry
        stochastic = cast_like(key, stochastic.astype(jnp.float32) + step, stochastic)
        return (stochastic, (nearest.astype(jnp.float32) + step).astype(jnp.bfloat16)), None

    start = jnp.asarray(values, jnp.bfloat16)
    (stochastic, nearest), _ = jax.lax.scan(one, (start, start), jax.random.split(jax.random.key(0), updates))
    assert np.all(np.asarray(nearest) == 1.0)
    found = np.asarray(stochastic).astype(np.float64) - 1
    assert found.mean() == pytest.approx(updates * step, rel=0.01)


def test_each_parameter_draws_its_own_noise():
    tree = {"a": jnp.full((64,), 1.001), "b": jnp.full((64,), 1.001), "c": jnp.full((3,), 1.001)}
    like = {"a": jnp.zeros((64,), jnp.bfloat16), "b": jnp.zeros((64,), jnp.bfloat16), "c": jnp.zeros((3,))}
    cast = cast_like(jax.random.key(0), tree, like)
    assert {k: v.dtype for k, v in cast.items()} == {k: v.dtype for k, v in like.items()}
    assert not np.array_equal(np.asarray(cast["a"]), np.asarray(cast["b"]))
    np.testing.assert_array_equal(np.asarray(cast["c"]), np.asarray(tree["c"]))
