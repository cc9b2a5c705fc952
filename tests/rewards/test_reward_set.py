"""How rewards are called, combined, and blamed."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrft.config import ConfigError
from jaxrft.data import Prompt
from jaxrft.rewards import RewardError, RewardSet
from jaxrft.rewards.calls import RewardPart, Samples

TEXTS = ["one", "two", "three"]
IDS = [[1], [2, 2], [3, 3, 3]]


def prompt(index, value="p", **columns):
    return Prompt(index=index, value=value, text=str(value), token_ids=[0], columns=columns)


PROMPTS = [prompt(10 * i, f"p{i}", answer=i, level=None) for i in range(3)]


def score(*functions, weights=None, on_error="stop", prompts=PROMPTS, texts=TEXTS, ids=IDS):
    rewards = RewardSet(list(functions), weights, on_error)
    try:
        return rewards.score(prompts, texts, ids)
    finally:
        rewards.close()


def test_a_reward_gets_what_it_takes_by_name():
    seen = {}

    def everything(prompts, completions, completion_ids, **columns):
        seen["everything"] = (prompts, completions, completion_ids, columns)
        return [0] * 3

    def some(completions, answer, *, missing="default"):
        seen["some"] = (completions, answer, missing)
        return [0] * 3

    class Judge:
        def __call__(self, completion_ids, level):
            seen["judge"] = (completion_ids, level)
            return [0] * 3

    scores = score(everything, some, Judge(), lambda answer: answer)
    assert list(scores.components) == ["everything", "some", "Judge", "lambda"]
    assert seen["everything"] == (["p0", "p1", "p2"], TEXTS, IDS, {"answer": [0, 1, 2], "level": [None] * 3})
    assert seen["some"] == (TEXTS, [0, 1, 2], "default")
    assert seen["judge"] == (IDS, [None] * 3)
    assert scores.components["lambda"].tolist() == [0, 1, 2]


def test_chat_prompts_have_messages_for_completions():
    chat = prompt(0, [{"role": "user", "content": "hi"}])
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [1.0]

    score(reward, prompts=[chat], texts=["yes"], ids=[[1]])
    assert seen == [([chat.value], [[{"role": "assistant", "content": "yes"}]])]


def test_what_a_reward_does_to_its_arguments_stays_there():
    chat = prompt(0, [{"role": "user", "content": "hi"}], answer="46")
    seen = []

    def careless(prompts, completions, completion_ids, answer):
        seen.append((len(prompts), len(completions), len(completion_ids), list(answer)))
        prompts[0][0]["content"] = answer[0] = "changed"
        for argument in (prompts, completions, completion_ids):
            argument.clear()
        return [1.0]

    ids = [[1]]
    score(careless, careless, prompts=[chat], texts=["yes"], ids=ids)
    assert seen == [(1, 1, 1, ["46"])] * 2
    assert (chat.value[0]["content"], chat.columns, ids) == ("hi", {"answer": "46"}, [[1]])


def test_weights_and_what_does_not_apply():
    rewards = [lambda answer: [1.0, None, None], lambda answer: np.array([2, 3, 4]), lambda answer: [None, True, None]]
    scores = score(*rewards, weights=[0.5, 10.0, -1.0])
    assert scores.total.dtype == scores.components["lambda"].dtype == np.float32
    assert scores.total.tolist() == [20.5, 29.0, 40.0]
    np.testing.assert_array_equal(scores.components["lambda"], np.float32([1, np.nan, np.nan]))
    assert list(scores.components) == ["lambda", "lambda_2", "lambda_3"]
    assert scores.errors == 0
    assert score(lambda answer: [1, 2, 3], lambda answer: [1, 1, 1]).total.tolist() == [2, 3, 4], "weights are 1"


def test_where_no_reward_applies_the_total_is_nan():
    total = score(lambda answer: [None, 0, None], lambda answer: [None, None, 0.0]).total
    np.testing.assert_array_equal(total, np.float32([np.nan, 0, 0]))


def test_async_rewards_run_beside_each_other_and_the_rest():
    begun, limit = [], time.monotonic() + 60

    def waits() -> bool:
        """For the other two; one after another they would wait in vain."""
        if time.monotonic() > limit:
            raise TimeoutError(f"only {begun} have begun")
        return len(begun) < 3

    async def slow(answer):
        begun.append("slow")
        while waits():
            await asyncio.sleep(0.01)
        return answer

    class Remote:
        async def __call__(self, completions):
            begun.append("remote")
            while waits():
                await asyncio.sleep(0.01)
            return [1] * len(completions)

    def blocking(completions):
        begun.append("blocking")
        while waits():
            time.sleep(0.01)
        return [2] * len(completions)

    assert score(slow, Remote(), blocking).total.tolist() == [3, 4, 5]


def test_async_rewards_work_inside_a_running_loop_and_keep_theirs():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    async def notebook():
        rewards = RewardSet([reward])
        for _ in range(2):
            rewards.score(PROMPTS, TEXTS, IDS)
        rewards.close()

    asyncio.run(notebook())
    assert loops[0] is loops[1]


@pytest.mark.parametrize("returned", [[1, 2], [1, 2, 3, 4], []])
def test_a_wrong_count_names_the_reward_and_both_counts(returned):
    for on_error in ("stop", "none"):
        with pytest.raises(RewardError, match=f"rewards: mine returned {len(returned)} values for 3 completions"):
            score(named("mine", lambda: returned), on_error=on_error)


@pytest.mark.parametrize("returned", [None, 1.0, "abc", {1: 1, 2: 2, 3: 3}, np.float32(1)])
def test_what_is_no_list_is_refused(returned):
    with pytest.raises(RewardError, match=f"mine returned {type(returned).__name__}, takes a list"):
        score(named("mine", lambda: returned))


@pytest.mark.parametrize("value", ["1", float("nan"), float("inf"), -np.inf, np.ones(1), 1j, object, 1e39, 10**400])
def test_what_is_no_finite_number_names_the_sample(value):
    reward = named("mine", lambda: [0.0, value, 1.0])
    with pytest.raises(RewardError, match=r"rewards: mine returned .* for sample 1 \(row 10 of the dataset\), .*'two'"):
        score(reward)
    scores = score(reward, on_error="none")
    np.testing.assert_array_equal(scores.components["mine"], np.float32([0, np.nan, 1]))
    assert scores.errors == 1


def named(name, function):
    def reward(completions):
        return function()

    reward.__name__ = name
    return reward


def fails_on(bad, *, asynchronous=False):
    """A reward that cannot read some texts."""
    calls = []

    def fragile(completions, answer):
        calls.append(list(completions))
        if any(text in bad for text in completions):
            raise KeyError("cannot\nread this")
        return [float(a) for a in answer]

    async def fragile_async(completions, answer):
        return fragile(completions, answer)

    return (fragile_async if asynchronous else fragile), calls


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_names_the_sample_and_keeps_its_cause(asynchronous):
    reward, calls = fails_on({"two"}, asynchronous=asynchronous)
    texts = ["one", "two", "x" * 300]
    with pytest.raises(RewardError) as caught:
        score(reward, texts=texts)
    message = str(caught.value)
    assert message.startswith(
        f"rewards: {reward.__name__} raised KeyError: 'cannot\\nread this' ({Path(__file__).relative_to(Path.cwd())}:"
    )
    assert "on sample 1 (row 10 of the dataset), completion 'two'; rewards.on_error: none" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, KeyError)
    if not asynchronous:
        assert calls == [texts, ["one"], ["two"]], "no further than the first that fails"
    with pytest.raises(RewardError, match="completion 'x{200}';"):
        score(fails_on({"x" * 300})[0], texts=texts)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_can_count_as_none(asynchronous):
    reward, _ = fails_on({"one", "three"}, asynchronous=asynchronous)
    scores = score(reward, lambda answer: [5, 5, None], on_error="none", weights=[1, 2])
    np.testing.assert_array_equal(scores.components[reward.__name__], np.float32([np.nan, 1, np.nan]))
    np.testing.assert_array_equal(scores.total, np.float32([10, 11, np.nan]))
    assert scores.errors == 2


def test_async_samples_are_isolated_at_the_same_time():
    running, most = set(), 0

    async def remote(completions):
        nonlocal most
        running.add(completions[0])
        most = max(most, len(running))
        await asyncio.sleep(0.3)
        running.remove(completions[0])
        if len(completions) > 1 or completions[0] == "7":
            raise ConnectionError
        return [1.0]

    texts = [str(i) for i in range(10)]
    scores = score(remote, prompts=[prompt(i) for i in range(10)], texts=texts, ids=[[1]] * 10, on_error="none")
    assert most == 10
    assert (scores.errors, float(np.nansum(scores.total))) == (1, 9.0)


@pytest.mark.parametrize("exits", [SystemExit, KeyboardInterrupt])
def test_an_async_reward_that_exits_is_an_error_and_ends_no_other(exits):
    """In asyncio these end the loop: nothing that runs in it would ever be answered."""

    async def leaves(completions):
        raise exits(3)

    async def sound(completions):
        await asyncio.sleep(0.05)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=f"{exits.__name__}") as caught:
        score(leaves, sound)
    assert isinstance(caught.value.__cause__.__cause__, exits)
    assert np.isnan(score(leaves, sound, on_error="none").components["leaves"]).all()


def test_an_exception_of_the_batch_alone_says_so():
    def together(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(
        RewardError, match="raised ValueError: too many .* on 3 samples together, and on none of them alone"
    ):
        score(together)
    assert score(together, on_error="none").total.tolist() == [1, 1, 1]


def test_a_single_sample_is_not_tried_again():
    reward, calls = fails_on({"one"})
    with pytest.raises(RewardError, match="sample 0"):
        score(reward, prompts=PROMPTS[:1], texts=["one"], ids=[[1]])
    assert calls == [["one"]]


def test_a_missing_column_is_named_before_and_when_scoring():
    def needs(completions, solution, level=None, **columns): ...

    rewards = RewardSet([needs])
    rewards.check(["solution"])
    expected = (
        r"rewards: needs needs the column 'solution', the dataset has answer, level .*; set data\.columns, as in {solu"
    )
    with pytest.raises(ConfigError, match=expected):
        rewards.check(["answer", "level"])
    with pytest.raises(ConfigError, match=expected):
        rewards.score(PROMPTS, TEXTS, IDS)


def scored_alone(rewards, i):
    part = RewardPart(Samples.of([PROMPTS[i]], [TEXTS[i]], [IDS[i]], [i]))
    rewards.begin_part(part)
    return rewards.finish_part(part)


def test_parts_make_the_scores_of_the_whole():
    """Bit for bit, with more rewards than numpy adds up in order for a single sample."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 3))

    def column(row):
        return lambda answer: [None if a == 1 and row % 2 else values[row, a] for a in answer]

    rewards = RewardSet([column(row) for row in range(20)], rng.normal(size=20).tolist())
    whole = rewards.score(PROMPTS, TEXTS, IDS)
    joined = rewards.total([scored_alone(rewards, i) for i in (2, 0, 1)])
    np.testing.assert_array_equal(joined.total, whole.total)
    for name in rewards.names:
        np.testing.assert_array_equal(joined.components[name], whole.components[name])
    with pytest.raises(RewardError, match=r"returned nan for sample 2 \(row 20 of the dataset\), completion 'three'"):
        scored_alone(RewardSet([lambda answer: [float("nan")]]), 2)


def test_no_samples_no_calls():
    scores = score(named("mine", lambda: 1 / 0), prompts=[], texts=[], ids=[])
    assert scores.total.shape == scores.components["mine"].shape == (0,)


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([], None, "rewards.functions: got none"),
        ([len], [1, 2], "reward_weights: got 2 weights for 1 rewards"),
        ([len], [float("nan")], "takes finite numbers"),
        (["math"], None, "'str' is str, takes a function"),
    ],
)
def test_bad_sets_are_refused(functions, weights, message):
    with pytest.raises(ConfigError, match=message):
        RewardSet(functions, weights)


def test_metrics_of_a_reward_and_its_end():
    class Counting:
        __name__ = "counting"
        closed = False

        def __call__(self, completions):
            return [0.0] * len(completions)

        def pop_metrics(self):
            return {"calls": 1.0}

        def close(self):
            self.closed = True

    reward = Counting()
    assert score(reward).metrics == {"rewards/counting/calls": 1.0}
    assert reward.closed
