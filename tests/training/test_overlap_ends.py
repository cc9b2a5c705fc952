"""Errors and interrupts while rewards are called beside generation: heard at once, and nothing that hangs."""

import asyncio
import itertools
import threading

import pytest

from jaxrft.rewards import RewardError, RewardSet
from jaxrft.training.collector import Collector
from tests.training.overlapping import (
    GROUP,
    PROMPTS,
    Engine,
    Judge,
    Service,
    Tokenizer,
    bounded,
    collect,
    patient,
    phases_of,
    wait_until,
)


def ends(completions):
    raise SystemExit("out of a reward")


def breaks(completions):
    if any(text.startswith("4") for text in completions):
        raise ValueError("no such answer")


@pytest.mark.parametrize(("failing", "kind"), [(ends, SystemExit), (breaks, RewardError)])
def test_an_error_comes_up_in_the_main_thread_and_ends_the_generation(failing, kind):
    """With the message of a single call; the groups after are neither generated nor scored. Then all goes on."""
    judge = Judge(failing=failing)
    with pytest.raises(kind) as expected:
        collect(Engine(), RewardSet([judge]), overlap=False)
    engine = Engine(stuck_at=4)
    collector = Collector(engine, Tokenizer(), RewardSet([judge, patient]), True)
    with pytest.raises(kind) as caught:
        collect(engine, None, collector=collector)
    assert str(caught.value) == str(expected.value)
    assert type(caught.value.__cause__) is type(expected.value.__cause__)
    judge.failing, engine.stuck_at = lambda texts: None, None
    judge.calls.clear()
    scores = collect(engine, None, collector=collector).scores
    assert scores.components["judge"].tolist() == [10.0 * p + i for p in range(5) for i in range(GROUP)]
    assert sum(map(len, judge.calls)) == 10, "nothing is left over of the rollout that failed"
    collector.close()


class Interrupted(Exception):
    pass


def test_an_interrupt_does_not_wait_for_a_reward():
    """What has not begun is dropped, and the next rollout waits for the call that still runs."""
    begun, go_on, asked = threading.Event(), threading.Event(), []
    judge = Judge(begun, go_on)

    def check():
        if asked:
            raise Interrupted

    def between(done):
        if done == 1:
            assert begun.wait(20)

    class Last(Engine):
        def generate(self, *arguments):
            completions = super().generate(*arguments)
            asked.append("Ctrl-C, while it waits for rewards")
            return completions

    engine = Last(between=between)
    before = threading.active_count()
    collector = Collector(engine, Tokenizer(), RewardSet([judge]), True)
    with pytest.raises(Interrupted):
        collect(engine, None, phases=phases_of(check), collector=collector)
    threading.Timer(0.1, go_on.set).start()
    assert collect(engine, None, collector=collector).scores.total.tolist()[-1] == 41
    assert [len(call) for call in judge.calls[:1]] == [2]
    assert sum(map(len, judge.calls[1:])) == 10, "groups of the rollout that was interrupted"
    collector.close()
    assert threading.active_count() == before


def test_async_rewards_that_nobody_waits_for_are_cancelled():
    """They neither hold up the next rollout, nor are they asked again for one sample after the other."""
    service, asked = Service(), []

    def check():
        if asked:
            raise Interrupted

    def between(done):
        service.wait_for_calls(done)
        if done == 3:
            asked.append("Ctrl-C")

    engine = Engine(between)
    collector = Collector(engine, Tokenizer(), RewardSet([service]), True)
    with pytest.raises(Interrupted):
        collect(engine, None, phases=phases_of(check), collector=collector)
    engine.between = lambda done: None
    threading.Timer(0.1, service.go_on.set).start()
    assert collect(engine, None, collector=collector).scores.total.tolist()[-1] == 4
    assert service.cancelled >= 3
    assert sorted(itertools.chain(*service.answered)) == [0, 1, 2, 3, 4]
    collector.close()


class Alone:
    """Raises on several groups' samples together; waits on those of group 3 alone, until it is let or cancelled."""

    __name__ = "alone"

    def __init__(self):
        self.hanging, self.cancelled, self.go_on = 0, 0, threading.Event()

    async def __call__(self, completions, answer):
        if len(answer) > 1 and not self.go_on.is_set():
            raise ValueError("together")
        self.hanging += 1
        try:
            while answer[0] == 3 and not self.go_on.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [float(a) for a in answer]


class Interrupting:
    """A signal that has come when ``begun`` holds, after the first group. ``phases`` are left then."""

    def __init__(self, begun):
        self.begun, self.asked = begun, False
        self.phases = phases_of(self.check)

    def between(self, done):
        if done == 1:
            wait_until(self.begun)
            self.asked = True

    def check(self):
        if self.asked:
            raise Interrupted


def interrupted(rewards, begun):
    """A collector whose rollout was interrupted when a condition held, and that may go on."""
    signal = Interrupting(begun)
    engine = Engine(signal.between)
    collector = Collector(engine, Tokenizer(), rewards, True)
    with pytest.raises(Interrupted):
        collect(engine, None, phases=signal.phases, collector=collector)
    engine.between = lambda done: None
    return collector


def test_samples_that_an_async_reward_is_asked_alone_are_cancelled_too():
    """Else whoever waits for them would hold up the next rollout."""
    reward = Alone()
    collector = interrupted(RewardSet([reward], on_error="none"), lambda: reward.hanging == GROUP)
    wait_until(lambda: reward.cancelled == GROUP)
    reward.go_on.set()
    scores = collect(None, None, phases=bounded(), collector=collector).scores
    assert scores.total.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    collector.close()
    wait_until(lambda: not any(thread.name == "reward answers" for thread in threading.enumerate()))


def test_samples_that_are_asked_alone_end_with_the_error_of_another():
    """Nobody wants the others' answers where a run stops at the first error."""
    waiting, cancelled = threading.Event(), threading.Event()

    async def half(completions):
        if len(completions) == 1 and completions[0].endswith("1"):
            try:
                waiting.set()
                await asyncio.sleep(3600)
            finally:
                cancelled.set()
        while len(completions) == 1 and not waiting.is_set():
            await asyncio.sleep(0.002)
        raise ValueError("half")

    with pytest.raises(RewardError, match="half"):
        RewardSet([half]).score(PROMPTS[:2], ["0", "1"], [[0], [1]])
    assert cancelled.wait(20)


def test_async_rewards_are_cancelled_while_a_function_beside_them_runs():
    service, begun, go_on = Service(), threading.Event(), threading.Event()
    judge = Judge(begun, go_on)
    collector = interrupted(RewardSet([service, judge]), lambda: begun.is_set() and service.running)
    wait_until(lambda: service.cancelled == 1)
    go_on.set()
    service.go_on.set()
    assert collect(None, None, phases=bounded(), collector=collector).scores.total.tolist()[-1] == 45
    assert sum(map(len, judge.calls[1:])) == 10
    collector.close()


def test_a_function_that_is_asked_one_by_one_is_not_asked_on_after_an_interrupt():
    """Nor is the reward after it."""
    begun, go_on, later = threading.Event(), threading.Event(), Judge()

    def raises_together(completions):
        if len(completions) == GROUP and completions[0].startswith("3"):
            judge.begun, judge.go_on = begun, go_on
            raise ValueError("together")

    judge = Judge(failing=raises_together)
    collector = interrupted(RewardSet([judge, later], on_error="none"), begun.is_set)
    go_on.set()
    judge.failing = lambda texts: None
    assert collect(None, None, phases=bounded(), collector=collector).scores.total.tolist()[-1] == 82
    assert judge.calls[:2] == [[3, 3], [3]], "together, then one alone"
    assert sum(map(len, judge.calls[2:])) == sum(map(len, later.calls)) == 10
    collector.close()


def test_no_reward_is_called_for_a_group_that_ends_after_an_interrupt():
    begun, asked = threading.Event(), []
    judge = Judge(begun, begun)

    def check():
        if asked:
            raise Interrupted

    class Telling(Engine):
        """Gives a reward time to begin once a group was told of."""

        def generate(self, requests, sampling, on_progress, on_finished):
            def told(place, completions):
                asked.append("Ctrl-C, in the middle of a chunk")
                on_finished(place, completions)
                assert begun.wait(20)

            return super().generate(requests, sampling, on_progress, told)

    with pytest.raises(Interrupted):
        collect(Telling(), RewardSet([judge]), phases=phases_of(check))
    assert judge.calls == []


def test_an_error_is_heard_while_an_earlier_group_waits_for_its_answer():
    ended = threading.Event()

    async def patient_with_three(completions, answer):
        if 3 not in answer:
            raise ValueError(f"on {answer[0]}")
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    engine = Engine(stuck_at=2)
    with pytest.raises(RewardError, match="ValueError: on 0"):
        collect(engine, RewardSet([patient_with_three]))
    assert ended.wait(20)


def test_a_collector_that_is_closed_refuses_in_place_of_waiting_for_ever():
    collector = Collector(Engine(), Tokenizer(), RewardSet([Judge()]), True)
    collect(None, None, collector=collector)
    collector.close()
    with pytest.raises(RuntimeError, match="closed"):
        collect(None, None, phases=bounded(), collector=collector)
