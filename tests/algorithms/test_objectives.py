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

OBJECTIVES = {
    "ppo": {},
    "clip_higher": {"clip_low": 0.2, "clip_high": 0.28, "reduction": "sequence_mean"},
    "dual": {"dual_clip": 3.0, "reduction": "sequence_sum"},
    "constant_k1": {"clip_low": 0.0, "reduction": "constant", "constant_length": 7, "kl_coef": 0.1, "kl_kind": "k1"},
    "token_k2": {"reduction": "sequence_mean", "kl_coef": 0.2, "kl_kind": "k2"},
    "gspo": {"level": "sequence", "clip_low": 0.03, "clip_high": 0.04, "reduction": "sequence_mean"},
    "gspo_k3": {"level": "sequence", "kl_coef": 0.3, "kl_kind": "k3", "reduction": "token_mean"},
    "gspo_dual": {"level": "sequence", "dual_clip": 1.5, "reduction": "constant", "constant_length": 3},
}
SHAPES = [(1, 5), (4, 1), (1, 1)]


@functools.partial(jax.jit, static_argnums=0)
def evaluate(objective, logprobs, old, advantages, mask, ref):
    """(loss, statistics) and gradient."""

    def loss(logprobs):
        return alg.policy_loss(objective, logprobs, old, advantages, mask, ref_logprobs=ref)

    return jax.value_and_grad(loss, has_aux=True)(logprobs)


def random_case(rng, shape, spread, by_token):
    """Inputs with holes, empty rows and garbage at masked places; log-ratios of about ``spread``."""
    logprobs = -rng.exponential(3.0, shape)
    old, ref = (logprobs + spread * rng.uniform(-1, 1, shape) for _ in range(2))
    advantages = rng.normal(size=shape if by_token else shape[:1]) * rng.choice([0.1, 1.0, 30.0])
    mask = (rng.random(shape) < 0.7) * (rng.random((shape[0], 1)) < 0.8)
    arrays = [a.astype(np.float32) for a in (logprobs, old, advantages, mask, ref)]
    for array in arrays:
        if array.shape == shape and array is not arrays[3]:
            array[mask == 0] = rng.choice([np.nan, np.inf, -np.inf, -1e30], size=int((mask == 0).sum()))
    return arrays


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("usual", [True, False], ids=["usual", "small"])
def test_equals_the_formula(name, usual):
    rng = np.random.default_rng(3)
    number, fields = list(OBJECTIVES).index(name), OBJECTIVES[name]
    shape = (5, 6) if usual else SHAPES[number % len(SHAPES)]
    for trial in range(12):
        spread = [0.0, 0.01, 0.5, 5.0, 19.9, 40.0][trial % 6]
        logprobs, old, advantages, mask, ref = case = random_case(rng, shape, spread, by_token=trial >= 6)
        (loss, stats), gradient = evaluate(alg.PolicyObjective(**fields), *case)
        expected, slope, expected_stats, size = reference.policy_loss(fields, logprobs, old, advantages, mask, ref)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5 * (1 + size))
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6 * (1 + np.abs(slope).max()))
        assert set(stats) == set(expected_stats)
        for key, value in expected_stats.items():
            np.testing.assert_allclose(stats[key], value, rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_of_the_formula_by_finite_differences(name):
    """The closed form that the test above relies on."""
    rng = np.random.default_rng(5)
    logprobs, old, advantages, mask, ref = random_case(rng, (3, 4), 0.5, by_token=True)
    mask[:] = rng.random(mask.shape) < 0.8
    logprobs, old, ref = (np.nan_to_num(a.astype(np.float64), posinf=0, neginf=0) for a in (logprobs, old, ref))
    advantages = np.nan_to_num(advantages, posinf=0, neginf=0)
    _, gradient, _, _ = reference.policy_loss(OBJECTIVES[name], logprobs, old, advantages, mask, ref)
    for place in np.ndindex(logprobs.shape):
        step = np.zeros(logprobs.shape)
        step[place] = 1e-6
        up, down = (
            reference.policy_loss(OBJECTIVES[name], logprobs + s, old, advantages, mask, ref)[0] for s in (step, -step)
        )
        np.testing.assert_allclose((up - down) / 2e-6, gradient[place], rtol=1e-5, atol=1e-7)


def test_all_masked():
    rng = np.random.default_rng(0)
    logprobs, old, advantages, mask, ref = random_case(rng, (5, 6), 1.0, by_token=False)
    for name, fields in OBJECTIVES.items():
        garbage = np.full_like(logprobs, np.nan)
        (loss, stats), gradient = evaluate(
            alg.PolicyObjective(**fields), garbage, old, advantages * np.inf, np.zeros_like(mask), ref
        )
        assert loss == 0, name
        assert not np.any(gradient)
        assert not any(stats.values())


def test_bool_and_integer_masks_are_masks():
    case = random_case(np.random.default_rng(1), (5, 6), 0.5, by_token=False)
    objective = alg.PolicyObjective(**OBJECTIVES["gspo_k3"])
    kinds = (np.float32, bool, np.int32)
    results = [evaluate(objective, *case[:3], case[3].astype(kind), case[4]) for kind in kinds]
    assert all(np.array_equal(gradient, results[0][1]) for _, gradient in results)


logprob_arrays = hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 0, width=32))


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    logprobs=logprob_arrays,
    old=logprob_arrays,
    ref=logprob_arrays,
    advantages=hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)),
    mask=hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, 1.0])),
    near=st.booleans(),
)
def test_always_finite(name, logprobs, old, ref, advantages, mask, near):
    if near:  # Two arrays drawn apart hardly ever have ratios that are not clamped.
        old, ref = (logprobs + 1e-3 * array for array in (old, ref))
    (loss, stats), gradient = evaluate(alg.PolicyObjective(**OBJECTIVES[name]), logprobs, old, advantages, mask, ref)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))
    assert all(np.isfinite(v) for v in stats.values())
    assert not np.any(np.asarray(gradient)[mask == 0])


def test_sequence_level_of_single_tokens_is_the_token_level():
    logprobs, old, advantages, mask, ref = random_case(np.random.default_rng(2), (6, 5), 0.5, by_token=False)
    mask[:] = 0
    mask[np.arange(6), [0, 1, 2, 3, 4, 2]] = 1
    logprobs, old, ref = (np.nan_to_num(a, nan=-1.0, posinf=0, neginf=-9) for a in (logprobs, old, ref))
    results = [
        evaluate(alg.PolicyObjective(level=level, kl_coef=0.1, dual_clip=2.0), logprobs, old, advantages, mask, ref)
        for level in ("token", "sequence")
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), *results)


def test_reductions_agree_on_equal_lengths():
    logprobs, old, advantages, mask, ref = random_case(np.random.default_rng(3), (4, 7), 0.5, by_token=False)
    logprobs, old = (np.nan_to_num(a, nan=-1.0, posinf=0, neginf=-9) for a in (logprobs, old))
    mask[:] = 0
    for row in range(4):
        mask[row, row : row + 3] = 1
    token, sequence, total, constant = (
        evaluate(alg.PolicyObjective(reduction=r, constant_length=3), logprobs, old, advantages, mask, ref)
        for r in ("token_mean", "sequence_mean", "sequence_sum", "constant")
    )
    for (loss, _), gradient in (sequence, constant, ((total[0][0] / 3, None), total[1] / 3)):
        np.testing.assert_allclose(loss, token[0][0], rtol=1e-5)
        np.testing.assert_allclose(gradient, token[1], rtol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "clip_higher", "dual", "gspo", "gspo_dual"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
    """Of sum w A log p, whatever is clipped."""
    logprobs, _, advantages, mask, ref = random_case(np.random.default_rng(4), (5, 6), 0.5, by_token=False)
    objective = alg.PolicyObjective(**OBJECTIVES[name])
    (loss, stats), gradient = evaluate(objective, logprobs, logprobs, advantages, mask, ref)
    weights = alg.token_weights(mask, objective.reduction, alg.totals(mask), objective.constant_length)
    np.testing.assert_allclose(gradient, -weights * advantages[:, None], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss, -np.sum(weights * advantages[:, None]), rtol=1e-5)
    np.testing.assert_allclose(stats["ratio/mean"], 1.0, rtol=1e-6)
    assert stats["ratio/deviation_max"] == stats["policy_kl"] == stats["clip_ratio/region_mean"] == 0


def test_no_gradient_but_through_logprobs():
    """Old log-probabilities that are the current ones by mistake or by design do not cancel the gradient."""
    logprobs, _, advantages, mask, _ = random_case(np.random.default_rng(6), (5, 6), 0.5, by_token=False)

    def loss(x):
        return alg.policy_loss(
            alg.PolicyObjective(kl_coef=0.5, kl_kind="k2"), x, x, advantages, mask, ref_logprobs=x - 1
        )[0]

    expected = -alg.token_weights(mask, "token_mean", alg.totals(mask)) * (advantages[:, None] - 0.5)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logprobs)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["clip_higher", "constant_k1", "gspo_k3", "gspo_dual"])
def test_parts_add_up_to_the_whole(name):
    """The sums of the parts' losses and gradients, and their merged statistics, are the batch's."""
    case = random_case(np.random.default_rng(8), (5, 6), 0.6, by_token=False)
    objective, mask = alg.PolicyObjective(**OBJECTIVES[name]), case[3]
    (loss, stats), gradient = evaluate(objective, *case)

    @jax.jit
    def part(logprobs, old, advantages, mask, ref, whole):
        def f(x):
            return alg.policy_loss(objective, x, old, advantages, mask, ref_logprobs=ref, whole=whole)

        return jax.value_and_grad(f, has_aux=True)(logprobs)

    assert len({int(row.sum()) for row in mask}) > 2, "rows of one length would hide wrong counts"
    results = [part(*(a[row : row + 1] for a in case), alg.totals(mask)) for row in range(5)]
    losses, gradients = [r[0][0] for r in results], np.concatenate([r[1] for r in results])
    np.testing.assert_allclose(sum(losses), loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients, gradient, rtol=1e-5, atol=1e-8)
    merged = alg.merge_stats(jax.tree.map(lambda *x: jnp.stack(x), *[r[0][1] for r in results]))
    assert set(merged) == set(stats)
    for key, value in stats.items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_merged_maxima_and_minima_are_not_sums():
    values = jnp.array([1.0, 3.0, 2.0])
    merged = alg.merge_stats({"a/max": values, "b_min": values, "c/mean": values})
    assert merged == {"a/max": 3.0, "b_min": 1.0, "c/mean": 6.0}


def test_padding_changes_nothing():
    case = random_case(np.random.default_rng(10), (5, 6), 0.5, by_token=True)
    for name in ("clip_higher", "constant_k1", "gspo_k3"):
        objective = alg.PolicyObjective(**OBJECTIVES[name])
        padded = [np.pad(a, ((0, 2), (0, 3)), constant_values=0 if i == 3 else np.nan) for i, a in enumerate(case)]
        (loss, stats), gradient = evaluate(objective, *case)
        (other, other_stats), other_gradient = evaluate(objective, *padded)
        np.testing.assert_allclose(other, loss, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(other_gradient[:5, :6], gradient, rtol=1e-6, atol=1e-8)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), other_stats, stats)


def test_an_objective_is_a_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnames="objective")
    def loss(objective, logprobs, advantages, mask):
        traces.append(objective)
        return alg.policy_loss(objective, logprobs, logprobs, advantages, mask)[0]

    arrays = jnp.zeros((2, 3)), jnp.ones((2,)), jnp.ones((2, 3))
    for clip_high in (0.3, 0.3, 0.4, 0.3):
        loss(alg.PolicyObjective(clip_high=clip_high), *arrays)
    assert [o.clip_high for o in traces] == [0.3, 0.4]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective", "clpi", "objective: got 'clpi', takes clip; did you mean clip"),
        ("level", "sequense", "level: got 'sequense', takes token or sequence; did you mean sequence"),
        (
            "reduction",
            "token_men",
            "takes .*, sequence_sum or constant; did you mean token_mean",
        ),
        ("kl_kind", "K3", "kl_kind: got 'K3', takes k1, k2 or k3"),
        ("clip_low", -0.1, "clip_low: got -0.1, takes at least 0"),
        ("clip_high", float("nan"), "clip_high: got nan, takes at least 0"),
        ("dual_clip", 0.5, "dual_clip: got 0.5, takes at least 1"),
        ("constant_length", 0, "constant_length: got 0, takes at least 1"),
        ("kl_coef", -1.0, "kl_coef: got -1.0, takes at least 0"),
    ],
)
def test_wrong_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        alg.PolicyObjective(**{field: value})


def test_wrong_inputs_are_refused():
    full, row, flat = jnp.zeros((2, 3)), jnp.zeros((1, 3)), jnp.zeros((2,))
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"old_logprobs: got shape \(1, 3\), takes \(2, 3\)"):
        alg.policy_loss(alg.PolicyObjective(), full, row, flat, full)
    with pytest.raises(ValueError, match=r"advantages: got shape \(3,\), takes \(2, 3\) or \(2,\)"):
        alg.policy_loss(alg.PolicyObjective(), full, full, jnp.zeros((3,)), full)
    with pytest.raises(ValueError, match=r"logprobs: got shape \(2, 3\), takes \(1, 1\)"):
        alg.policy_loss(alg.PolicyObjective(), full, full, flat, one)
    with pytest.raises(ValueError, match="ref_logprobs: needed where kl_coef is above 0"):
        alg.policy_loss(alg.PolicyObjective(kl_coef=0.1), full, full, flat, full)
    with pytest.raises(ValueError, match="constant_length: the reduction 'constant' needs one"):
        alg.policy_loss(alg.PolicyObjective(reduction="constant"), full, full, flat, full)
    with pytest.raises(ValueError, match="reduction: got 'mean', takes token_mean"):
        alg.token_weights(full, "mean", alg.totals(full))
