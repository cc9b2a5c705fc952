"""Policy losses, their gradients and statistics, against the formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrft import algorithms as alg
from tests.algorithms import reference
from tests.algorithms.cases import (
    GROUPS,
    OBJECTIVES,
    SHAPE,
    Case,
    batch_of,
    evaluate,
    fields_of,
    loss_of,
    objective_of,
    random_case,
)

SPREADS = [0.0, 0.01, 0.3, 0.5, 1.0, 5.0, 19.9, 40.0]
SMALL_SHAPES = [(1, 5), (5, 1), (1, 1)]
SMALL = [
    "dual", "gspo_dual", "gmpo", "gspo_token_dual", "clip_cov_dual", "kl_cov", "luspo_dual", "vespo", "gvpo",
    "truncate_sequence", "mask_geometric", "opsm", "entropy_batch", "entropy_sequence", "all_at_once",
]  # fmt: skip
MARGIN = 1e-5
KINKED_AT_ONE = ("one_sided", "opsm_zero")  # Their thresholds are where nothing has moved.


def draw(name, rng, shape, spread, per_token=True):
    """A case, its batch for the reference and the loss there; nothing in it is decided by rounding."""
    for _ in range(50):
        case = random_case(rng, shape, spread, per_token=per_token)
        batch = batch_of(case)
        expected = reference.policy_loss(fields_of(name), batch)
        if min(batch.margins, default=1) > MARGIN:
            return case, batch, expected
    raise AssertionError("no batch without near ties")


def agrees(name, case, batch, expected):
    """The loss to 1e-5 of the sum of its terms' sizes, the gradient to 1e-4 of itself, statistics to 1e-5.

    Where a token's slope is the small difference of large terms, as r times k3 has it far from the reference, float32
    rounds it by the size of its loss; difference quotients in float64 by that of the row's largest.
    """
    (loss, stats), gradient = evaluate(objective_of(name), case)
    (value, size), fields = expected, fields_of(name)
    np.testing.assert_allclose(loss, value, rtol=1e-5, atol=1e-5 * min(1, size) + 1e-6 * size + 1e-9)
    slopes, losses = reference.gradient(fields, batch), np.abs(reference.token_losses(fields, batch))
    rounding = 1e-6 * losses + (1e-9 * losses + 1e-5 * np.abs(slopes)).max(axis=1, keepdims=True) + 1e-7
    assert np.all(np.abs(gradient - slopes) <= 1e-4 * np.abs(slopes) + rounding), (gradient, slopes)
    for key, number in reference.statistics(fields, batch).items():
        np.testing.assert_allclose(stats[key], number, rtol=1e-5, atol=2e-6, err_msg=key)
    return slopes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_formula(name):
    rng = np.random.default_rng(list(OBJECTIVES).index(name))
    spreads = SPREADS[1:] if name in KINKED_AT_ONE else SPREADS
    sizes = [np.abs(agrees(name, *draw(name, rng, SHAPE, spread))).max() for spread in spreads]
    assert max(sizes) > 1e-3, "the comparison has something to compare"


@pytest.mark.parametrize(("number", "name"), enumerate(SMALL))
def test_equals_the_formula_in_a_batch_of_one_and_of_one_token(number, name):
    """Advantages by sequence, but in a batch of one row: there every covariance would be a rounding error."""
    rng, shape = np.random.default_rng(number), SMALL_SHAPES[number % len(SMALL_SHAPES)]
    for spread in (0.3, 0.3, 2.0, 30.0):
        agrees(name, *draw(name, rng, shape, spread, per_token=shape[0] == 1))


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "entropy_batch", "entropy_sequence"])
def test_of_equals_the_first_are_taken(name):
    """Of numbers that float32 holds exactly; only clip_cov chooses at random."""
    rng = np.random.default_rng(5)
    for _ in range(6):
        case = random_case(rng, (4, 4), 0.3, garbage=False)
        case = case._replace(
            mask=np.ones((4, 4), np.float32),
            logprobs=-rng.integers(1, 3, (4, 4)).astype(np.float32),
            advantages=rng.choice([-1, 1], (4, 4)).astype(np.float32),
            entropies=rng.integers(0, 3, (4, 4)).astype(np.float32),
        )
        case = case._replace(old=case.logprobs - 0.125)
        batch = batch_of(case)
        agrees(name, case, batch, reference.policy_loss(fields_of(name), batch))


def test_shares_are_rounded_up_and_no_further():
    """0.6 of 25 tokens are 15, though that of float32 is more than 0.6."""
    case = random_case(np.random.default_rng(1), (1, 25), 0.1, garbage=False)
    for tokens, share, kept in [(5, 0.2, 1), (25, 0.6, 15), (3, 1 / 3, 1), (4, 0.26, 2), (7, 1e-3, 1), (7, 1.0, 7)]:
        mask = (np.arange(25) < tokens).astype(np.float32)[None]
        for scope in ("batch", "sequence"):
            objective = alg.PolicyObjective(entropy_share=share, entropy_scope=scope)
            selection = alg.token_selection(objective, *case[:3], mask, entropies=case.entropies)
            assert np.sum(selection.kept * mask) == kept, (tokens, share, scope)


def test_all_masked():
    case = random_case(np.random.default_rng(0), SHAPE, 1.0)
    nothing = case._replace(
        logprobs=np.full(SHAPE, np.nan, np.float32), advantages=case.advantages * np.inf, mask=np.zeros_like(case.mask)
    )
    for name in OBJECTIVES:
        (loss, stats), gradient = evaluate(objective_of(name), nothing)
        assert loss == 0, name
        assert not np.any(gradient), name
        assert all(np.isfinite(value) for value in stats.values()), name


def test_bool_and_integer_masks_are_masks():
    case = random_case(np.random.default_rng(1), SHAPE, 0.5)
    kinds = (case.mask, case.mask.astype(bool), case.mask.astype(np.int32))
    results = [evaluate(objective_of("all_at_once"), case._replace(mask=mask))[1] for mask in kinds]
    assert all(np.array_equal(gradient, results[0]) for gradient in results)


def arrays(low, high):
    return hnp.arrays(np.float32, SHAPE, elements=st.floats(low, high, width=32))


@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        Case,
        logprobs=arrays(-1e4, 0),
        old=arrays(-1e4, 0),
        advantages=arrays(-1e3, 1e3),
        mask=hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 1.0])),
        sampler=arrays(-1e4, 0),
        entropies=arrays(0, 12),
        ref=arrays(-1e4, 0),
        groups=hnp.arrays(np.int64, SHAPE[:1], elements=st.integers(0, GROUPS - 1)),
    ),
    near=st.sampled_from([1.0, 1e-2, 1e-3, 1e-5]),
)
def test_always_finite(case, near):
    # Arrays drawn apart hardly ever have ratios that are not clamped.
    if near < 1:
        moved = {k: case.logprobs + near * getattr(case, k) for k in ("old", "sampler", "ref")}
        case = case._replace(**moved)
    for name in OBJECTIVES:
        (loss, stats), gradient = evaluate(objective_of(name), case)
        assert np.isfinite(loss), name
        assert np.all(np.isfinite(gradient)), name
        assert all(np.isfinite(v) for v in stats.values()), name
        assert not np.any(np.asarray(gradient)[case.mask == 0]), name


def test_no_gradient_but_through_logprobs():
    """Old, sampler's and reference log-probabilities, advantages and entropies that hang on the same parameters."""
    case = random_case(np.random.default_rng(6), SHAPE, 0.5, garbage=False)

    def loss(x, objective, tied):
        moved = {k: getattr(case, k) + tied * (x - case.logprobs) for k in ("old", "sampler", "entropies", "ref")}
        return loss_of(objective, x, case._replace(advantages=case.advantages + tied * (x - case.logprobs), **moved))[0]

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    for name in ("all_at_once", "gvpo", "kl_cov", "cpgd_dual", "dppo_kl"):
        free, tied = (slope(jnp.asarray(case.logprobs), objective_of(name), number) for number in (0.0, 1.0))
        np.testing.assert_array_equal(tied, free, err_msg=name)


def test_an_objective_is_a_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnames="objective")
    def loss(objective, logprobs, advantages, mask):
        traces.append(objective)
        return alg.policy_loss(objective, logprobs, logprobs, advantages, mask)[0]

    inputs = jnp.zeros((2, 3)), jnp.ones((2,)), jnp.ones((2, 3))
    for clip_high in (0.3, 0.3, 0.4, 0.3):
        loss(alg.PolicyObjective(clip_high=clip_high), *inputs)
    assert [o.clip_high for o in traces] == [0.3, 0.4]
