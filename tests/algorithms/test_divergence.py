"""Estimators of the KL divergence: token by token, and as means over a vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms import reference

KINDS = ["k1", "k2", "k3", "k1+", "k3+"]


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


def test_with_a_plus_the_value_is_the_kinds_and_the_gradient_that_of_k2():
    x, ref = np.float32([-0.5, -2.0, -7.0]), np.float32([-1.0, -1.5, -3.0])
    slope = {kind: jax.grad(lambda x, k=kind: alg.kl(x, ref, k).sum())(jnp.asarray(x)) for kind in KINDS}
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(alg.kl(x, ref, f"{kind}+"), alg.kl(x, ref, kind), rtol=1e-6)
        np.testing.assert_allclose(slope[f"{kind}+"], slope["k2"], rtol=1e-6)
        assert not np.allclose(slope[kind], slope["k2"], rtol=0.1)


def test_the_kinds_agree_to_second_order():
    """k2 and k3 token by token; their mean and k1's over the vocabulary."""
    for d in (0.2, 0.1, 0.05):
        k2, k3 = (float(alg.kl(jnp.float32(d), jnp.float32(0), kind)) for kind in ("k2", "k3"))
        assert k2 - k3 == pytest.approx(d**3 / 6, rel=0.3)


def distributions(size=0.4):
    """Two vectors of logits."""
    logits, change = np.random.default_rng(1).normal(size=(2, 50))
    return jnp.float32(logits), jnp.float32(logits + size * change)


def divergence(logits, ref):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    return jnp.sum(jnp.exp(p) * (p - q))


def sampled(kind, logits, ref):
    """The mean over the policy's samples, through which no gradient flows."""
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * alg.kl(p, q, kind))


def test_means_over_the_policys_samples():
    """k1 and k3 have the divergence itself as their mean; k2 is off by the third order of the difference."""
    exact = float(divergence(*distributions()))
    assert exact > 0.03
    for kind in ("k1", "k3", "k1+", "k3+"):
        assert float(sampled(kind, *distributions())) == pytest.approx(exact, rel=1e-4)
    errors = [float(sampled("k2", *distributions(size)) - divergence(*distributions(size))) for size in (0.4, 0.2)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.3)


def test_mean_gradients_over_the_policys_samples():
    """Of k2, and of those with a plus, the divergence's own; of k1 none; of k3 that of the reversed one."""
    logits, ref = distributions()
    exact, reversed_ = jax.grad(divergence)(logits, ref), jax.grad(divergence, argnums=1)(ref, logits)
    assert np.abs(exact).max() > 1e-3
    expected = {"k1": 0 * exact, "k2": exact, "k3": reversed_, "k1+": exact, "k3+": exact}
    for kind, gradient in expected.items():
        ours = jax.jit(jax.grad(functools.partial(sampled, kind)))(logits, ref)
        np.testing.assert_allclose(ours, gradient, rtol=1e-4, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_weighted_by_the_ratio_loss_and_gradient_are_those_of_the_divergence(kind):
    """Whatever policy sampled: here one that takes every token of the vocabulary once."""
    logits, ref = distributions()
    objective = alg.PolicyObjective(kl_coef=1.0, kl_kind=kind, kl_weighted=True)
    uniform, ones = jnp.full((1, 50), -np.log(50.0)), jnp.ones((1, 50))

    def loss(logits):
        p, q = (jax.nn.log_softmax(x)[None] for x in (logits, ref))
        return alg.policy_loss(objective, p, uniform, jnp.zeros(1), ones, ref_logprobs=q)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, divergence(logits, ref), rtol=1e-4)
    np.testing.assert_allclose(gradient, jax.grad(divergence)(logits, ref), rtol=1e-3, atol=1e-6)


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind: got 'k4', takes k1, k2, k3"):
        alg.kl(jnp.zeros(3), jnp.zeros(3), "k4")
