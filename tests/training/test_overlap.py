"""Rewards that are called while other groups are still generated: when, and the same scores."""

import asyncio
import threading
import time

import numpy as np
import pytest

from jaxrft.rewards import RewardSet
from jaxrft.training import overlap as module
from tests.training.overlapping import (
    Engine,
    Judge,
    Service,
    bounded,
    collect,
    fragile,
    patient,
    phases_of,
    wait_until,
)


def test_groups_that_wait_are_joined_and_all_scores_stand_in_order():
    """While group 3 is judged, the others come, in no order: one more call, and the scores of one call for all."""
    begun, go_on = threading.Event(), threading.Event()
    judge = Judge(begun, go_on)

    def between(done):
        if done == 1:
            assert begun.wait(20), "not called while others are generated"

    class Last(Engine):
        def generate(self, *arguments):
            completions = super().generate(*arguments)
            go_on.set()
            return completions

    phases = phases_of()
    rewards = RewardSet([judge, patient, fragile], [1.0, 0.3, 0.7], on_error="none")
    overlapped = collect(Last(between=between), rewards, phases=phases)
    assert judge.calls == [[3, 3], [0, 0, 1, 1, 2, 2, 4, 4]]
    whole = collect(Engine(), RewardSet([Judge(), patient, fragile], [1.0, 0.3, 0.7], on_error="none"), overlap=False)
    assert overlapped.texts == whole.texts
    np.testing.assert_array_equal(overlapped.scores.total, whole.scores.total)
    for name, values in whole.scores.components.items():
        np.testing.assert_array_equal(overlapped.scores.components[name], values)
    assert whole.scores.errors == overlapped.scores.errors == 2
    assert whole.scores.metrics == overlapped.scores.metrics == {"rewards/judge/last": 4.0}
    seconds = phases.timer.take()
    assert 0 < seconds["time/rewards_overlapped"] <= seconds["time/rollout"]


def test_async_rewards_of_several_groups_run_at_the_same_time_up_to_a_bound(monkeypatch):
    """A function beside them is called one part after the other, while they wait."""
    monkeypatch.setattr(module, "PARTS_AT_A_TIME", 4)
    service, judge = Service(), Judge()

    class Last(Engine):
        def generate(self, *arguments):
            completions = super().generate(*arguments)
            time.sleep(0.05)
            assert len(service.calls) == 4
            service.go_on.set()
            return completions

    def between(done):
        service.wait_for_calls(done)

    scores = collect(Last(between), RewardSet([service, judge])).scores
    assert service.calls == [[3], [0], [4], [1], [2]]
    assert service.most == 4
    assert [call[0] for call in judge.calls] == [3, 0, 4, 1, 2]
    assert scores.components["service"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("alone", [False, True])
def test_a_slow_answer_holds_up_no_other_group(alone, monkeypatch):
    """Nor where it is slow for one sample alone, after the reward raised on several."""
    monkeypatch.setattr(module, "PARTS_AT_A_TIME", 2)
    answered, go_on = [], threading.Event()

    async def slow(completions, answer):
        if alone and len(answer) > 1:
            raise ValueError("together")
        while 3 in answer and not go_on.is_set():
            await asyncio.sleep(0.002)
        answered.append(answer[0])
        return [float(a) for a in answer]

    def between(done):
        if done == 1:
            wait_until(lambda: any(thread.name == "reward answers" for thread in threading.enumerate()))
        if done > 1:
            wait_until(lambda: len(set(answered)) == done - 1)

    class Last(Engine):
        def generate(self, *arguments):
            completions = super().generate(*arguments)
            wait_until(lambda: set(answered) == {0, 1, 2, 4})
            go_on.set()
            return completions

    scores = collect(Last(between), RewardSet([slow], on_error="none"), phases=bounded()).scores
    assert scores.total.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
