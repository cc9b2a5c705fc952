"""From scores to the advantages of tokens, each step of it written out in NumPy."""

import numpy as np
import pytest

from jaxrft import algorithms as alg
from jaxrft.data.records import Prompt
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion
from jaxrft.training.batch import make_batch
from jaxrft.training.credit import Credit
from jaxrft.training.drawing import Drawn
from jaxrft.training.rollouts import RolloutBatch, make_samples

LONGEST, GROUP, WEIGHTS = 8, 3, np.array([1.0, 0.5], np.float32)
LENGTHS = np.array([8, 3, 5, 1, 2, 8, 7, 6, 4, 2, 5, 3])
RNG = np.random.default_rng(0)
FIRST, SECOND = (np.round(RNG.normal(size=(12, 2)), 2).astype(np.float32) for _ in range(2))
FIRST[4, 0] = FIRST[8, 1] = np.nan
FIRST[7] = np.nan  # No reward applies: not trained, counted nowhere.
FIRST[9:, 0] = 0.3  # One of the rewards is the same for the whole group.
DRIFT = RNG.normal(size=(12, LONGEST)).astype(np.float32)


def rollout_of(components, lengths=LENGTHS, group=GROUP):
    """Rewards, [samples, 2], as the reward set sums them: what does not apply counts as 0, unless nothing does."""
    nothing = np.isnan(components).all(axis=1)
    total = np.where(nothing, np.nan, np.nansum(components * WEIGHTS, axis=1)).astype(np.float32)
    completions = [
        Completion(token_ids=[1] * n, logprobs=np.zeros(n), sampled_logprobs=None, finish_reason="stop")
        for n in lengths
    ]
    return RolloutBatch(
        prompts=[Prompt(i, "", "", [1], {}) for i in range(len(lengths) // group)],
        completions=completions,
        texts=[""] * len(lengths),
        scores=Scores(total=total, components={"a": components[:, 0], "b": components[:, 1]}),
        group=group,
    )


def drawn_of(rollout, groups=None, dropped=()):
    count = len(rollout.prompts)
    return Drawn(
        rollout=rollout,
        groups=list(range(count)) if groups is None else list(groups),
        dropped=np.isin(np.arange(count), dropped),
        prompts=count,
    )


def credit_of(recipe="grpo", **changes):
    return Credit(alg.recipe(recipe).with_overrides({"constant_length": LONGEST, **changes}), WEIGHTS, LONGEST)


def token_advantages(credit, drawn, greedy=None, order=None, rows=None):
    """Advantages [samples, LONGEST] of what is trained on, its mask, and the mean KL."""
    rollout = drawn.rollout.select(drawn.groups)
    samples = make_samples(rollout, False, drawn.dropped[drawn.groups])
    order = list(range(len(samples))) if order is None else order
    batch = make_batch([samples[i] for i in order], rows or len(samples), temperature=1.0)
    shape = batch.mask.shape
    old, reference = np.full(shape, -2, np.float32), DRIFT[order].reshape(shape) - 2
    batch = type(batch)(**{**vars(batch), "old_logprobs": old, "ref_logprobs": reference})
    batch, kl = credit.assign(batch, drawn, greedy, order)
    back = np.argsort(order)
    advantages, mask = (np.asarray(a).reshape(-1, LONGEST)[back] for a in (batch.advantages, batch.mask))
    assert not advantages[mask == 0].any()
    return advantages, mask, float(kl)


def sample_advantages(credit, drawn, **options):
    """The same where all tokens of a sample have one; NaN for those that are not trained."""
    advantages, mask, _ = token_advantages(credit, drawn, **options)
    first = advantages[:, :1]
    np.testing.assert_allclose(advantages, first * mask, atol=1e-6)
    return np.where(mask[:, 0] > 0, first[:, 0], np.nan)


def normalised(rewards, group=GROUP, scale=True):
    """GRPO's advantages, group by group; NaN where there is no reward."""
    result = np.full(len(rewards), np.nan)
    for start in range(0, len(rewards), group):
        places = [i for i in range(start, start + group) if not np.isnan(rewards[i])]
        values = rewards[places].astype(np.float64)
        spread = values.std(ddof=1) if len(values) > 1 and np.ptp(values) > 0 else 0.0
        result[places] = (values - values.mean()) / (spread + 1e-6 if scale and spread else 1.0)
    return result


def totals(components):
    return rollout_of(components).scores.total


# ------------------------------------------------------------------ rewards


def test_a_reward_that_does_not_apply_counts_nowhere():
    """Its sample is not trained, and the others of its group are compared with each other alone."""
    found = sample_advantages(credit_of(), drawn_of(rollout_of(FIRST)))
    assert np.isnan(found[7])
    np.testing.assert_allclose(found, normalised(totals(FIRST)), rtol=1e-4, atol=1e-5)


def test_shaping_is_done_in_its_order_and_goes_on_over_rollouts():
    """Length terms, then the running norm, in which the present rollout counts, then the clip."""
    shaping = {
        "overlong_buffer": 0.5,
        "overlong_factor": 2.0,
        "length_penalty": 0.4,
        "running_norm": "standardize",
        "reward_clip": 0.9,
    }
    credit = credit_of("reinforce_pp", whiten=False, **shaping)
    punished = -2 * np.maximum(LENGTHS - 4, 0) / 4 - 0.4 * LENGTHS / 8
    seen = np.zeros(0)
    for components in (FIRST, SECOND):
        found = sample_advantages(credit, drawn_of(rollout_of(components)))
        rewards = totals(components) + punished
        seen = np.append(seen, rewards[~np.isnan(rewards)])
        expected = np.clip((rewards - seen.mean()) / seen.std(ddof=1), -0.9, 0.9)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert (np.abs(expected) == 0.9).any()
        assert (np.abs(expected) < 0.9).any()
    count, mean, m2 = credit.state()["reward_moments"]
    np.testing.assert_allclose([count, mean, m2], [23, seen.mean(), seen.var() * 23], rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"baseline": "batch_mean", "scale": "batch_std"},
        {"whiten": True, "scale": "none"},
        {"group_weight": "informative"},
        {"running_norm": "scale", "scale": "none"},
        {"aggregation": "normalize_then_sum", "baseline": "batch_mean", "scale": "batch_std"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_dropped_group_counts_nowhere(changes):
    """Whatever it holds: all others are as if it had not been drawn."""
    wild = SECOND.copy()
    wild[3:6] = [[1e4, -1e4], [5, 5], [0, 7]]
    wild[9:] = 0.3
    found = sample_advantages(credit_of(**changes), drawn_of(rollout_of(wild), dropped=[1]))
    kept = np.r_[0:3, 6:12]
    without = sample_advantages(credit_of(**changes), drawn_of(rollout_of(wild[kept], LENGTHS[kept])))
    np.testing.assert_allclose(found[kept], without, rtol=1e-5)
    assert np.isnan(found[3:6]).all()
    assert not np.allclose(without, sample_advantages(credit_of(**changes), drawn_of(rollout_of(wild)))[kept])


def test_groups_are_chosen_in_their_order_and_the_others_left():
    drawn = drawn_of(rollout_of(SECOND), groups=[0, 3])
    found = sample_advantages(credit_of(), drawn)
    np.testing.assert_allclose(found, normalised(totals(SECOND))[[0, 1, 2, 9, 10, 11]], rtol=1e-4)


# ------------------------------------------------------------------ advantages


def test_several_rewards_are_normalised_apart_and_the_length_is_one_more():
    """GDPO: NaN of one reward is 0 there, and so is a reward that is the same for all of a group."""
    settings = {"aggregation": "normalize_then_sum", "overlong_buffer": 0.5}
    found = sample_advantages(credit_of(**settings), drawn_of(rollout_of(FIRST)))
    length = -np.maximum(LENGTHS - 4, 0) / 4
    columns = [np.nan_to_num(normalised(FIRST[:, k])) for k in (0, 1)]
    expected = columns[0] + 0.5 * columns[1] + normalised(length)
    expected[7] = np.nan
    assert (columns[0][9:] == 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_greedy_completion_is_the_baseline_and_shaped_alike(aggregation):
    greedy = np.array([[0.5, 1.0], [np.nan, np.nan], [0.1, -0.2], [2.0, 0.0]], np.float32)
    lengths = np.array([8, 4, 6, 2])
    credit = credit_of("remax", length_penalty=0.8, aggregation=aggregation)
    found = sample_advantages(credit, drawn_of(rollout_of(SECOND)), greedy=rollout_of(greedy, lengths, group=1))
    shaped = totals(SECOND) - 0.1 * LENGTHS
    baseline = np.repeat(rollout_of(greedy, lengths, group=1).scores.total - 0.1 * lengths, GROUP)
    expected = np.nan_to_num(shaped - baseline)
    if aggregation == "normalize_then_sum":  # The length applies where no reward does.
        expected[3:6] = 0.1 * (4 - LENGTHS[3:6])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_greedy_completion_is_not_among_the_rewards_seen():
    credit = credit_of("remax", running_norm="standardize")
    greedy = rollout_of(np.full((4, 2), 50, np.float32), np.full(4, 3), group=1)
    found = sample_advantages(credit, drawn_of(rollout_of(SECOND)), greedy=greedy)
    rewards = totals(SECOND)
    assert credit.state()["reward_moments"][0] == 12
    np.testing.assert_allclose(found, (rewards - 75) / rewards.std(ddof=1), rtol=1e-4)


def test_the_kl_in_the_rewards_is_what_is_still_to_come():
    """Token t has the outcome less the weighted KL of the tokens from t on, all discounted; the mean is reported."""
    credit = credit_of("reinforce_pp", whiten=False, gamma=0.9, kl_coef=0.3)
    credit.kl_coef = 0.7  # As it is after it was adapted.
    found, mask, kl = token_advantages(credit, drawn_of(rollout_of(FIRST)))
    expected = np.zeros((12, LONGEST))
    per_token = -DRIFT  # k1 of old and reference.
    for i, length in enumerate(LENGTHS):
        for t in range(length if i != 7 else 0):
            ahead = np.arange(t, length)
            expected[i, t] = (
                0.9 ** (length - 1 - t) * totals(FIRST)[i] - 0.7 * (0.9 ** (ahead - t) * per_token[i, ahead]).sum()
            )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert kl == pytest.approx(per_token[mask > 0].mean(), rel=1e-5)
    in_loss = token_advantages(credit_of(kl_coef=0.3), drawn_of(rollout_of(FIRST)))
    np.testing.assert_array_equal(in_loss[0], token_advantages(credit_of(), drawn_of(rollout_of(FIRST)))[0])
    assert in_loss[2] == 0


def test_whitening_counts_the_trained_tokens_alone():
    """Neither padding, nor samples without a reward, nor dropped groups; long responses count by their tokens."""
    found, mask, _ = token_advantages(credit_of("reinforce_pp"), drawn_of(rollout_of(FIRST), dropped=[3]))
    counts = mask.sum(-1)
    np.testing.assert_array_equal(counts > 0, np.isin(np.arange(12), [0, 1, 2, 3, 4, 5, 6, 8]))
    rewards = np.repeat(totals(FIRST), counts.astype(int))
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    np.testing.assert_allclose(found[mask > 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["opo", "reinforce_pp", "reinforce", "dapo"])
def test_the_order_and_the_parts_of_a_batch_do_not_matter(recipe):
    order = [5, 11, 0, 7, 2, 9, 1, 10, 4, 8, 3, 6]
    plain = token_advantages(credit_of(recipe, kl_coef=0.1), drawn_of(rollout_of(FIRST)))
    mixed = token_advantages(credit_of(recipe, kl_coef=0.1), drawn_of(rollout_of(FIRST)), order=order, rows=3)
    np.testing.assert_allclose(mixed[0], plain[0], rtol=1e-4, atol=1e-6)
    assert np.abs(plain[0]).max() > 0.1


# ------------------------------------------------------------------ state


def test_the_weight_of_the_kl_follows_its_target():
    credit = credit_of(kl_coef=0.2, kl_target=0.1, kl_horizon=40)
    weights = [credit.kl_coef]
    for observed in (0.5, 0.11, 0.05, 0.1, float("nan")):
        credit.adapt(observed, 20)
        weights.append(credit.kl_coef)
    factors = [1 + 0.2 * 0.5, 1 + 0.1 * 0.5, 1 - 0.2 * 0.5, 1, 1]
    np.testing.assert_allclose(weights, 0.2 * np.cumprod([1, *factors]))
    credit.adapt(0.0, 0)
    assert credit.kl_coef == weights[-1], "nothing was trained, so nothing was observed"
    fixed = credit_of(kl_coef=0.2)
    fixed.adapt(0.5, 20)
    assert fixed.kl_coef == 0.2


def test_state_is_taken_up():
    """The rewards seen, and the weight where it is adapted; where it is not, a changed config counts."""
    adaptive = {"running_norm": "scale", "scale": "none", "kl_coef": 0.2, "kl_target": 0.1, "kl_horizon": 40}
    first = credit_of(**adaptive)
    sample_advantages(first, drawn_of(rollout_of(FIRST)))
    first.adapt(0.9, 20)
    second = credit_of(**adaptive)
    second.load(first.state())
    assert second.state() == first.state()
    credits = (first, second, credit_of(**adaptive))
    found = [sample_advantages(credit, drawn_of(rollout_of(SECOND))) for credit in credits]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])
    fixed = credit_of(kl_coef=0.5)
    fixed.load(first.state())
    assert fixed.kl_coef == 0.5
