"""Estimators of the KL divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference

KINDS = ["k1", "k2", "k3"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind):
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(5.0, (3, 40)).astype(np.float32)
    ref = (logprobs + rng.uniform(-1, 1, (3, 40)) * np.array([[1.0], [19.9], [1e4]])).astype(np.float32)
    values, slopes = np.vectorize(lambda p, q: reference.kl(p, q, kind))(logprobs, ref)
    np.testing.assert_allclose(alg.kl(logprobs, ref, kind), values, rtol=2e-5, atol=1e-5)
    gradient = jax.grad(lambda x: alg.kl(x, ref, kind).sum())(jnp.asarray(logprobs))
    np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_is_as_20_apart_and_has_no_gradient(kind, gap):
    value, slope = jax.value_and_grad(lambda x: alg.kl(x, jnp.float32(-1e4), kind))(jnp.float32(gap - 1e4))
    np.testing.assert_allclose(value, alg.kl(jnp.float32(np.sign(gap) * 20), jnp.float32(0), kind), rtol=1e-6)
    assert slope == 0


def test_expectations_over_a_vocabulary():
    """k1 and k3 have the divergence itself as their mean; k2 is off by the third order of the difference."""
    rng = np.random.default_rng(1)
    logits, change = rng.normal(size=(2, 50))

    def means(size):
        p, q = (jax.nn.log_softmax(jnp.float32(x)) for x in (logits, logits + size * change))
        return np.array([float(jnp.sum(jnp.exp(p) * alg.kl(p, q, kind))) for kind in KINDS]), p, q

    (k1, k2, k3), p, q = means(0.4)
    p, q = np.float64(p), np.float64(q)
    exact = np.sum(np.exp(p) * (p - q))
    assert exact > 0.03
    np.testing.assert_allclose([k1, k3], exact, rtol=1e-4)
    errors = [means(size)[0][1] - means(size)[0][2] for size in (0.4, 0.2)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.3)
    assert abs(errors[0]) < 0.2 * k2


def test_k2_and_k3_agree_to_second_order_token_by_token():
    for d in (0.2, 0.1, 0.05):
        k2, k3 = (float(alg.kl(jnp.float32(d), jnp.float32(0), kind)) for kind in ("k2", "k3"))
        assert k2 - k3 == pytest.approx(d**3 / 6, rel=0.3)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind: got 'k4', takes k1, k2 or k3"):
        alg.kl(jnp.zeros(3), jnp.zeros(3), "k4")
