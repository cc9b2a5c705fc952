"""What must hold between losses, whatever the numbers: one objective is another's special case, or its sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import algorithms as alg
from tests.algorithms.cases import GROUPS, KEY, OBJECTIVES, SHAPE, evaluate, objective_of, random_case

FREE = {"clip_low": 1e6, "clip_high": 1e6}
SEQUENCE = {"level": "sequence", "clip_low": 0.1, "clip_high": 0.15}


def case_of(seed, spread=0.5, per_token=False, **changes):
    """Every row has a token, or what is tested may hold of nothing."""
    case = random_case(np.random.default_rng(seed), SHAPE, spread, garbage=False)
    advantages = case.advantages if per_token else np.repeat(case.advantages[:, :1], SHAPE[1], axis=1)
    case.mask[:, 0] = 1
    return case._replace(**{"advantages": advantages, **changes})


def same(first, second, scale=1.0, rtol=1e-5):
    """Equal losses and gradients, and not of nothing."""
    ((loss, _), gradient), ((other, _), other_gradient) = first, second
    size = np.abs(gradient).max()
    assert size > 1e-3
    np.testing.assert_allclose(loss, scale * other, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(gradient, scale * other_gradient, rtol=rtol, atol=rtol * size)


def different(first, second):
    assert not np.allclose(first[1], second[1], rtol=1e-3), "the case does not tell them apart"


SPECIAL_CASES = {
    "dro of nothing": ({"objective": "dro", "dro_coef": 0.0}, {"objective": "reinforce"}),
    "clip_cov of nothing": ({"objective": "clip_cov", "cov_share": 0.0, "dual_clip": 1.2}, {"dual_clip": 1.2}),
    "kl_cov of nothing": ({"objective": "kl_cov", "cov_share": 0.0}, FREE),
    "all entropies": ({"entropy_share": 1.0}, {}),
    "gmpo unclipped": ({"level": "geometric", **FREE}, {"level": "sequence", **FREE}),
    "cispo unclipped": (
        {"objective": "cispo", **FREE},
        {"objective": "reinforce", "correction": "truncate", "correction_high": 1e6},
    ),
    "luspo": (
        {"objective": "luspo", "reduction": "sequence_mean", **SEQUENCE},
        {"reduction": "sequence_sum", **SEQUENCE},
    ),
    "cap and dual clip": ({"ratio_cap": 1.3}, {"dual_clip": 1.3}),
    "cap and dual clip of sequences": ({"ratio_cap": 1.2, **SEQUENCE}, {"dual_clip": 1.2, **SEQUENCE}),
    "nobody has left the sampler": ({"sequence_mask": 1e3}, {}),
    "dppo gates": (
        {"objective": "dppo_tv", **FREE},
        {"objective": "dppo_kl", **FREE},
    ),
}


@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_special_cases(name):
    """The advantages are those of tokens where the level is theirs: the capped and the dual clip see both signs."""
    first, second = (alg.PolicyObjective(**fields) for fields in SPECIAL_CASES[name])
    case = case_of(1, per_token=first.level == "token")
    # The ratio of cispo, as the correction of samples whose sampler was the current policy's inverse.
    case = case._replace(sampler=2 * case.old - case.logprobs) if name == "cispo unclipped" else case
    same(evaluate(first, case), evaluate(second, case))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_correction_of_the_same_policy_is_none(kind, level):
    case = case_of(2, per_token=True)
    bounds = {"correction_low": 0.9, "correction_high": 1.1} if kind == "mask" else {"correction_high": float("inf")}
    objective = alg.PolicyObjective(correction=kind, correction_level=level, **bounds)
    same(evaluate(objective, case._replace(sampler=case.old)), evaluate(alg.PolicyObjective(), case))
    different(evaluate(objective, case), evaluate(alg.PolicyObjective(), case))


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_of_single_tokens_all_levels_are_one(level):
    mask = np.zeros(SHAPE, np.float32)
    mask[np.arange(5), [0, 1, 5, 3, 2]] = 1
    case, fields = case_of(2, mask=mask), {"kl_coef": 0.1, "dual_clip": 1.3}
    token, other = (evaluate(alg.PolicyObjective(level=name, **fields), case) for name in ("token", level))
    same(token, other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), token[0][1], other[0][1])


def test_reductions_agree_on_equal_lengths():
    mask = np.zeros(SHAPE, np.float32)
    for row, first in enumerate([0, 1, 3, 2, 0]):
        mask[row, first : first + 3] = 1
    case = case_of(3, mask=mask)
    token, sequence, total, constant = (
        evaluate(alg.PolicyObjective(reduction=name, constant_length=3), case)
        for name in ("token_mean", "sequence_mean", "sequence_sum", "constant")
    )
    same(token, sequence)
    same(token, constant)
    same(token, total, 1 / 3)


AT_ONE = {name: OBJECTIVES[name] for name in (
    "ppo", "clip_higher", "dual", "cap", "one_sided", "gspo", "gspo_token", "gmpo", "reinforce", "sapo", "sapo_token",
    "sapo_sequence", "dppo_tv", "dppo_kl", "vespo", "vespo_flat", "dro",
)}  # fmt: skip
AT_ONE |= {
    "cispo": {"objective": "cispo"},
    "cpgd": {"objective": "cpgd", "drift_coef": 0.0, "dual_clip": 2.0},
    "cpgd_drift": {"objective": "cpgd", "drift_coef": 9.0},
    "kl_cov": {"objective": "kl_cov", "cov_coef": 0.0},
}


@pytest.mark.parametrize("name", AT_ONE)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
    """Of sum w A log p, whatever is clipped; where ratios count, so is the loss that of ratios of 1."""
    case = case_of(4)
    case, objective = case._replace(old=case.logprobs), alg.PolicyObjective(**AT_ONE[name])
    (_, stats), gradient = evaluate(objective, case)
    weights = alg.token_weights(case.mask, objective.reduction, alg.totals(case.mask), objective.constant_length)
    np.testing.assert_allclose(gradient, -weights * case.advantages, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(stats["ratio/mean"], 1.0, rtol=1e-6)
    assert stats["ratio/deviation_max"] == stats["policy_kl"] == 0


@pytest.mark.parametrize("fields", [{**SEQUENCE, "dual_clip": 1.2}, {"objective": "sapo"}], ids=["clip", "sapo"])
def test_token_and_sequence_gradients_have_equal_sums(fields):
    """And are equal where the advantages of a sequence are."""
    fields = {"reduction": "sequence_mean", **fields}
    for per_token in (False, True):
        case = case_of(5, spread=0.3, per_token=per_token)
        levels = ("sequence", "sequence_token")
        sequence, token = (evaluate(alg.PolicyObjective(**{**fields, "level": level}), case) for level in levels)
        np.testing.assert_allclose(token[0][0], sequence[0][0], rtol=1e-6)
        np.testing.assert_allclose(token[1].sum(axis=1), sequence[1].sum(axis=1), rtol=1e-4, atol=1e-6)
        different(token, sequence) if per_token else same(token, sequence)


def test_gvpo_is_at_its_optimum_where_implied_and_given_rewards_agree():
    """But for a constant of each group. There its loss and gradient are 0, and not a step away."""
    objective, case = objective_of("gvpo", gvpo_coef=0.5), case_of(6)
    totals = np.sum((case.logprobs - case.old) * case.mask, axis=1)
    given = 0.5 * totals + np.array([3.0, -1.0, 0.5])[case.groups]
    best = case._replace(advantages=np.repeat(given[:, None], SHAPE[1], axis=1).astype(np.float32))
    (loss, _), gradient = evaluate(objective, best)
    assert abs(loss) < 1e-10
    assert np.abs(gradient).max() < 1e-6
    assert len(set(case.groups)) > 1
    other = best._replace(groups=np.zeros_like(best.groups))
    assert np.abs(evaluate(objective, other)[1]).max() > 1e-2


@pytest.mark.parametrize("name", ["all_at_once", "gvpo"])
def test_advantages_of_sequences_are_those_of_all_their_tokens(name):
    case, objective = case_of(7), objective_of(name)
    same(evaluate(objective, case._replace(advantages=case.advantages[:, 0])), evaluate(objective, case))


def test_a_coefficient_that_is_given_stands_for_the_objectives():
    case = case_of(7, per_token=True)
    given = evaluate(objective_of("kl_k2", kl_coef=9.0), case, kl_coef=jnp.float32(0.3))
    same(given, evaluate(objective_of("kl_k2", kl_coef=0.3), case))
    same(evaluate(objective_of("kl_k2"), case, kl_coef=0.0), evaluate(objective_of("kl_k2", kl_coef=0.0), case))


# Not clip_cov, whose draws hang on the row and the place.
PLAIN = ["gmpo", "kl_cov", "gvpo", "mask_sequence", "opsm", "entropy_sequence"]


@pytest.mark.parametrize("name", PLAIN)
def test_order_and_padding_change_nothing(name):
    case, objective = random_case(np.random.default_rng(8), SHAPE, 0.5), objective_of(name)
    whole = evaluate(objective, case)
    order = np.array([3, 0, 4, 2, 1])
    moved = evaluate(objective, type(case)(*(array[order] for array in case)))
    same(whole, (moved[0], np.asarray(moved[1])[np.argsort(order)]))
    padded = {
        key: np.pad(array, ((0, 2), (0, 3)), constant_values=0 if key == "mask" else np.nan)
        for key, array in case._asdict().items()
        if array.ndim == 2
    }
    other = evaluate(objective, case._replace(**padded, groups=np.pad(case.groups, (0, 2))))
    same(whole, (other[0], other[1][:5, :6]))
    for stats in (moved[0][1], other[0][1]):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), stats, whole[0][1])


PARTS = [
    "clip_higher", "gspo_dual", "luspo", "vespo", "clip_cov", "kl_cov_mean", "entropy_sequence", "mask_geometric",
    "all_at_once",
]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_add_up_to_the_whole(name):
    """The sums of the parts' losses and gradients, and their merged statistics, are the batch's."""
    case, objective = random_case(np.random.default_rng(9), SHAPE, 0.6), objective_of(name)
    assert len({int(row.sum()) for row in case.mask}) > 2, "rows of one length would hide wrong counts"
    whole = evaluate(objective, case)
    selection = alg.token_selection(objective, *case[:4], entropies=case.entropies, key=KEY)
    rows = [jax.tree.map(lambda array, row=row: array[row : row + 1], (case, selection)) for row in range(5)]
    results = [evaluate(objective, part, whole=alg.totals(case.mask), selection=chosen) for part, chosen in rows]
    stats = alg.merge_stats(jax.tree.map(lambda *x: jnp.stack(x), *[result[0][1] for result in results]))
    same(whole, ((sum(result[0][0] for result in results), stats), np.concatenate([r[1] for r in results])))
    assert set(stats) == set(whole[0][1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), stats, whole[0][1])


def test_groups_of_gvpo_are_parts():
    case, objective = case_of(10), objective_of("gvpo")
    masks = [case.mask * (case.groups == group)[:, None] for group in range(GROUPS)]
    totals = alg.totals(case.mask)
    parts = [evaluate(objective, case._replace(mask=mask), whole=totals) for mask in masks]
    loss, gradient = sum(part[0][0] for part in parts), sum(part[1] for part in parts)
    same(evaluate(objective, case), ((loss, {}), gradient))


def test_merged_maxima_and_minima_are_not_sums():
    values = jnp.array([1.0, 3.0, 2.0])
    merged = alg.merge_stats({"a/max": values, "b_min": values, "c/mean": values})
    assert merged == {"a/max": 3.0, "b_min": 1.0, "c/mean": 6.0}
