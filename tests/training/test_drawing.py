"""Filters of groups and dynamic sampling: what is drawn, what is trained on, and a run that is interrupted in it."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft import algorithms as alg
from jaxrft.config import AlgorithmConfig
from jaxrft.data.records import Prompt
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion
from jaxrft.tracking import read_completions, read_metrics
from jaxrft.training import Interrupted
from jaxrft.training.checkpoint import Checkpoints
from jaxrft.training.drawing import draw, dropped_groups
from jaxrft.training.rollouts import RolloutBatch, make_samples
from tests.training.tiny import ROWS, digits, tiny_config

NONE = float("nan")
EQUAL, VARIED = [1.0, 1.0], [0.0, 1.0]
DYNAMIC = alg.GroupFilter(dynamic_sampling=True)


def rollout_of(groups, first=0):
    """Groups of one size, by their rewards."""
    total = np.array(groups, np.float32).reshape(-1)
    completion = Completion(token_ids=[1], logprobs=np.zeros(1), sampled_logprobs=None, finish_reason="stop")
    return RolloutBatch(
        prompts=[Prompt(first + i, "", "", [0], {}) for i in range(len(groups))],
        completions=[completion] * len(total),
        texts=[""] * len(total),
        scores=Scores(total=total, components={"r": total}, errors=1, metrics={"seen": 2.0}),
        group=len(groups[0]),
    )


def drawn_from(stream, start, count, filter):
    """What is drawn of a stream of groups that repeats, and the calls that were made for it."""
    calls = []

    def collect(first, number):
        calls.append((first, number))
        return rollout_of([stream[i % len(stream)] for i in range(first, first + number)], first)

    return draw(collect, start, count, filter), calls


# ------------------------------------------------------------------ dynamic sampling


@pytest.mark.parametrize(
    ("stream", "count", "most", "calls", "groups"),
    [
        ([VARIED], 4, 10, [4], [0, 1, 2, 3]),
        # Half are kept: two more need four. Of the third four, all but the last that is needed are left.
        ([VARIED, EQUAL], 4, 10, [4, 4], [0, 2, 4, 6]),
        ([EQUAL, EQUAL, EQUAL, VARIED], 3, 10, [3, 3, 3, 3], [3, 7, 11]),
        # None in three: as many again. Then one of six: three more, not twelve.
        ([EQUAL] * 4 + [VARIED], 3, 10, [3, 3, 3, 3, 3], [4, 9, 14]),
        # The limit: 2 x 4 prompts. Two are missing, and the first of those dropped fill up.
        ([EQUAL, VARIED, EQUAL, EQUAL], 4, 2, [4, 4], [0, 1, 2, 5]),
        ([EQUAL], 2, 3, [2, 2, 2], [0, 1]),
        ([VARIED, EQUAL], 4, 1, [4], [0, 1, 2, 3]),
    ],
)
def test_prompts_are_drawn_until_the_rollout_is_whole(stream, count, most, calls, groups):
    filter = alg.GroupFilter(dynamic_sampling=True, max_draws=most)
    drawn, made = drawn_from(stream, 0, count, filter)
    starts = np.cumsum([0, *calls])
    assert made == list(zip(starts.tolist(), calls))
    assert (drawn.groups, drawn.prompts) == (groups, sum(calls))


@pytest.mark.parametrize("seed", range(60))
def test_drawing_of_random_streams(seed):
    """Exactly as many groups as asked for, in order, from a stretch of the stream without gaps, within the limit."""
    rng = np.random.default_rng(seed)
    choices = [EQUAL, VARIED, [NONE, NONE], [NONE, 1.0], [0.5, 0.9]]
    stream = [choices[i] for i in rng.choice(5, size=23, p=rng.dirichlet([1, 1, 0.5, 0.5, 0.5]))]
    start, count, most = int(rng.integers(0, 30)), int(rng.integers(1, 7)), int(rng.integers(1, 5))
    filter = alg.GroupFilter(dynamic_sampling=True, max_draws=most, difficulty_high=0.6)
    drawn, calls = drawn_from(stream, start, count, filter)
    good = [stream[i % 23] == VARIED for i in range(start, start + drawn.prompts)]
    assert [first for first, _ in calls] == [start + sum(n for _, n in calls[:k]) for k in range(len(calls))]
    assert all(1 <= number <= count for _, number in calls)
    assert sum(number for _, number in calls) == drawn.prompts == len(drawn.rollout.prompts) <= most * count
    assert [prompt.index for prompt in drawn.rollout.prompts] == list(range(start, start + drawn.prompts))
    assert drawn.dropped.tolist() == [not kept for kept in good]
    assert len(drawn.groups) == count
    assert drawn.groups == sorted(set(drawn.groups))
    kept = [group for group in drawn.groups if good[group]]
    assert kept == np.flatnonzero(good)[:count].tolist(), "the first that are good"
    assert len(kept) == count or drawn.prompts == most * count, "it went on to the limit"
    if len(calls) > 1:
        before = drawn.prompts - calls[-1][1]
        assert sum(good[:before]) < count, "it stopped as soon as there were enough"
    again, same = drawn_from(stream, start, count, filter)
    assert (again.groups, same) == (drawn.groups, calls)


def test_what_fills_up_is_not_trained():
    drawn, _ = drawn_from([EQUAL, VARIED, EQUAL, EQUAL], 0, 4, alg.GroupFilter(dynamic_sampling=True, max_draws=2))
    chosen = drawn.rollout.select(drawn.groups)
    samples = make_samples(chosen, False, drawn.dropped[drawn.groups])
    assert [s.trained for s in samples] == [False, False, True, True, False, False, True, True]
    assert drawn.samples == [0, 1, 2, 3, 4, 5, 10, 11]
    np.testing.assert_array_equal(chosen.scores.total, [1, 1, 0, 1, 1, 1, 0, 1])
    assert drawn.metrics(DYNAMIC) == {
        "filter/drawn_ratio": 2.0,
        "filter/kept_ratio": 0.25,
        "filter/missing_groups": 2.0,
    }
    assert (drawn.rollout.scores.errors, drawn.rollout.scores.metrics) == (2, {"seen": 4.0}), "of all that was drawn"


# ------------------------------------------------------------------ which groups are dropped

GROUPS = {
    "equal": [0.4] * 10,
    "varied": [0.0] * 5 + [1.0] * 5,
    "3 of 10": [0.0] * 7 + [1.0] * 3,
    "7 of 10": [0.0] * 3 + [1.0] * 7,
    "none": [NONE] * 10,
    "one": [NONE] * 9 + [1.0],
    "some": [NONE] * 8 + [0.0, 0.6],
}


@pytest.mark.parametrize(
    ("filter", "dropped"),
    [
        ({}, []),
        ({"dynamic_sampling": True}, ["equal", "none", "one"]),
        ({"difficulty_low": 0.3}, ["none"]),
        ({"difficulty_low": 0.31}, ["3 of 10", "none", "some"]),
        ({"difficulty_high": 0.7}, ["none", "one"]),
        ({"difficulty_high": 0.69}, ["7 of 10", "none", "one"]),
        ({"difficulty_low": 0.4, "difficulty_high": 0.4}, ["varied", "3 of 10", "7 of 10", "none", "one", "some"]),
        ({"dynamic_sampling": True, "difficulty_low": 0.5}, ["equal", "3 of 10", "none", "one", "some"]),
    ],
)
def test_bounds_hold_their_ends_and_the_mean_is_of_the_rewards_that_apply(filter, dropped):
    found = dropped_groups(rollout_of(list(GROUPS.values())), alg.GroupFilter(**filter))
    assert [name for name, out in zip(GROUPS, found) if out] == dropped


def test_without_dynamic_sampling_nothing_is_replaced():
    """The rollout is the next prompts; those outside of the bounds are left out of the loss."""
    stream = [VARIED, [0.0, 0.1], EQUAL, [0.2, 0.4]]
    for filter, dropped in (
        (alg.GroupFilter(difficulty_low=0.2, difficulty_high=0.9), [False, True, True, False]),
        (alg.GroupFilter(), [False] * 4),
    ):
        drawn, calls = drawn_from(stream, 4, 4, filter)
        assert (calls, drawn.groups, drawn.prompts) == ([(4, 4)], [0, 1, 2, 3], 4)
        assert drawn.dropped.tolist() == dropped
    assert drawn.metrics(alg.GroupFilter()) == {}


# ------------------------------------------------------------------ whole runs


def make_trainer(folder, reward, **changes):
    """Rollouts of two prompts, two updates each, with everything that keeps a state from one to the next."""
    settings = {
        "algorithm": AlgorithmConfig(
            recipe="dapo",
            scale="none",
            max_draws=3,
            running_norm="standardize",
            kl_target=0.01,
            kl_horizon=40,
            difficulty_high=0.9,
        ),
        "beta": 0.05,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 3,
    }
    config = tiny_config(folder, **settings | changes)
    return RLTrainer(config=config, reward_funcs=reward, train_dataset=ROWS[:13])


def partly(prompts, completions, **_):
    """Equal for two of three prompts, so that more have to be drawn."""
    return [value if (int(p[0]) + int(p[2])) % 3 == 0 else 0.5 for p, value in zip(prompts, digits(completions))]


def interrupting(at):
    """The same; the reward's call of that number sends a signal."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(prompts)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return partly(prompts, completions)

    reward.__name__ = "partly"
    return reward


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(list(dict.fromkeys(prompts)))
        return partly(prompts, completions)

    reward.__name__ = "partly"
    trainer = make_trainer(tmp_path_factory.mktemp("whole") / "run", reward)
    trainer.train()
    trainer.seen = seen
    return trainer


def steps_of(trainer):
    return [record for record in read_metrics(trainer.folder.metrics) if "reward" in record]


def is_kept(group):
    """Whether the filter of the run lets a group pass."""
    rewards = [row["reward"] for row in group]
    return max(rewards) > min(rewards) and np.mean(rewards) <= 0.9


def punished(group):
    """Rewards less what a completion's length takes off."""
    return [row["reward"] - max(row["tokens"] - 3.2, 0) / 0.8 for row in group]


def rollout_records(trainer):
    """Metrics of the first update of each rollout, and its completions, group by group."""
    rows = read_completions(trainer.folder.path)
    for record in steps_of(trainer)[::2]:
        mine = [row for row in rows if row["step"] == record["step"] + 1]
        yield record, [mine[i : i + 4] for i in range(0, len(mine), 4)]


def test_a_run_takes_the_prompts_in_their_order_without_gaps(whole):
    drawn = [prompt for call in whole.seen for prompt in call]
    assert [len(call) for call in whole.seen] == [2] * 8, "three calls, two and three"
    prompts = whole.train_prompts.prompts
    assert drawn == [prompts[i].text for i in whole.order.take(0, len(drawn))]
    assert steps_of(whole)[-1]["epoch"] == pytest.approx(len(drawn) / 13)


def test_what_a_run_reports_of_its_filter(whole):
    """Groups drawn, kept and missing; what is dropped has no advantage."""
    ratios = [(r["filter/drawn_ratio"], r["filter/missing_groups"]) for r, _ in rollout_records(whole)]
    assert ratios == [(3, 0), (2, 0), (3, 1)], "drawn again in each rollout, to the limit in the last"
    for record, groups in rollout_records(whole):
        rewards = [[row["reward"] for row in group] for group in groups]
        kept = [is_kept(group) for group in groups]
        assert record["filter/drawn_ratio"] == len(groups) / 2
        assert record["filter/kept_ratio"] == pytest.approx(np.mean(kept))
        assert record["filter/missing_groups"] == max(2 - sum(kept), 0)
        trained = [any(row["advantage"] for row in group) for group in groups]
        # Punished for their length, different rewards may be equal.
        differ = [max(values) - min(values) > 1e-6 for values in map(punished, groups)]
        assert trained == [good and sum(kept[:i]) < 2 and differ[i] for i, good in enumerate(kept)]
        assert record["reward"] == pytest.approx(np.mean(rewards)), "of all that was generated"


def test_each_sample_has_its_own_advantage(whole):
    """The reward, punished for its length, over the spread of all seen so far, less the group's mean."""
    seen = []
    for _, groups in rollout_records(whole):
        trained = [group for group in groups if is_kept(group)][:2]
        seen += [value for group in trained for value in punished(group)]
        for group in trained:
            expected = (np.array(punished(group)) - np.mean(punished(group))) / np.std(seen, ddof=1)
            np.testing.assert_allclose([row["advantage"] for row in group], expected, rtol=1e-4, atol=1e-5)


def test_the_weight_of_the_kl_is_adapted_after_each_rollout(whole):
    steps, weight = steps_of(whole), 0.05
    for first, second in zip(steps[::2], steps[1::2]):
        assert first["kl_coef"] == second["kl_coef"] == pytest.approx(weight, rel=1e-6)
        trained = 4 * (2 - first["filter/missing_groups"])
        weight = alg.adaptive_kl_coef(weight, (first["kl"] + second["kl"]) / 2, 0.01, 40, trained)
    assert weight != 0.05
    assert record_of(whole)["credit"]["kl_coef"] == pytest.approx(weight, rel=1e-6)


def test_a_rollout_without_a_group_to_train_on_changes_nothing(tmp_path, capsys):
    """It is said and counted; neither the weight of the KL nor the audit takes it for an observation."""
    calls = []

    def late(prompts, completions, **_):
        calls.append(1)
        return [0.5] * len(completions) if len(calls) == 1 else digits(completions)

    algorithm = AlgorithmConfig(recipe="dapo", max_draws=1, kl_target=0.01, kl_horizon=40)
    trainer = make_trainer(tmp_path / "run", late, algorithm=algorithm, steps_per_generation=2, max_steps=4)
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("none of 2 groups passed the filter of dapo") == 1
    assert said.index("none of 2 groups") < said.index("audit passed")
    steps = steps_of(trainer)
    assert [record["skipped_steps"] for record in steps] == [1, 2, 2, 2]
    assert [record["filter/missing_groups"] for record in steps] == [2, 2, 0, 0]
    assert [record["grad_norm"] > 0 for record in steps] == [False, False, True, True]
    assert {record["kl_coef"] for record in steps} == {0.05}


def record_of(trainer):
    store = Checkpoints(trainer.folder.checkpoints, limit=1)
    try:
        return store.restore(trainer.learner.state).record
    finally:
        store.close()


@pytest.mark.parametrize("at", ["in the second rollout's draws", "after the last draw"])
def test_interrupted_and_resumed_is_bit_equal(whole, tmp_path, at):
    """The position in the stream, the rewards seen and the weight of the KL go on where they stood."""
    with pytest.raises(Interrupted):  # The first rollout takes three calls of the reward, the second two.
        make_trainer(tmp_path / "run", interrupting(4 if at.startswith("in") else 5)).train()
    stopped = max(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert stopped == 2
    resumed = make_trainer(tmp_path / "run", partly, resume_from_checkpoint=True)
    resumed.train()
    pairs = zip(*map(jax.tree.leaves, (whole.learner.state, resumed.learner.state)))
    assert all(np.array_equal(a, b) for a, b in pairs)
    ours, theirs = record_of(resumed), record_of(whole)
    assert ours == theirs
    assert (ours["rollouts"], ours["prompts"]) == (3, 16)
    assert ours["credit"]["reward_moments"][0] == 3 * 8 - 4, "of the rewards that were trained on"
    moving = ("time", "compiles", "tokens_per_second", "peak_memory")
    for record, expected in zip(steps_of(resumed), steps_of(whole), strict=True):
        assert {k: v for k, v in record.items() if not k.startswith(moving)} == {
            k: v for k, v in expected.items() if not k.startswith(moving)
        }
    for name in sorted(os.listdir(whole.folder.path / "completions")):
        mine, its = (t.folder.path / "completions" / name for t in (resumed, whole))
        assert mine.read_text() == its.read_text()
