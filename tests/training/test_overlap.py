"""Rewards that are called while other groups are still generated: the same scores, and nothing that hangs."""

import asyncio
import io
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import AlgorithmConfig, RewardsConfig, RolloutConfig
from jaxrft.data.records import Prompt
from jaxrft.rewards import RewardError, RewardSet
from jaxrft.rollout.records import Completion, SamplingParams
from jaxrft.tracking import Console, read_completions, read_metrics
from jaxrft.tracking.timing import PhaseTimer
from jaxrft.training import overlap as module
from jaxrft.training.collector import Collector
from jaxrft.training.phases import Phases
from tests.training.tiny import ROWS, digits, tiny_config

PROMPTS = [Prompt(10 * i, f"p{i}", f"p{i}", [i], {"answer": i}) for i in range(5)]
GROUP = 2


class Engine:
    """Finishes groups in an order of its own; ``between`` is called before each, with how many were finished.

    It works on for ever where ``stuck_at`` are.
    """

    def __init__(self, between=lambda done: None, stuck_at=None):
        self.order, self.between, self.stuck_at = (3, 0, 4, 1, 2), between, stuck_at

    def generate(self, requests, sampling, on_progress=None, on_finished=None):
        groups = [[self._answer(request, i) for i in range(request.n)] for request in requests]
        for done, place in enumerate(self.order):
            self.between(done)
            deadline = time.monotonic() + 20
            while done == self.stuck_at:
                on_progress(done, len(groups))
                assert time.monotonic() < deadline, "nothing has ended it"
            if on_finished is not None:
                on_finished(place, groups[place])
            on_progress(done + 1, len(groups))
        return list(itertools.chain(*groups))

    def _answer(self, request, i):
        tokens = [request.prompt_ids[0], i]
        return Completion(token_ids=tokens, logprobs=np.zeros(2), sampled_logprobs=None, finish_reason="stop")


class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


class Judge:
    """Keeps the answers of each call. With gates it says that a call has begun, and waits to be let on."""

    __name__ = "judge"

    def __init__(self, begun=None, go_on=None, failing=lambda texts: None):
        self.calls, self.begun, self.go_on, self.failing = [], begun, go_on, failing
        self.running = threading.Lock()

    def __call__(self, completions, answer):
        assert self.running.acquire(blocking=False), "called while a call of it runs"
        try:
            self.calls.append(list(answer))
            if self.begun:
                self.begun.set()
                assert self.go_on.wait(20)
            self.failing(completions)
            return [10.0 * a + int(text[-1]) for text, a in zip(completions, answer)]
        finally:
            self.running.release()

    def pop_metrics(self):
        """A number that is no sum over calls."""
        return {"last": float(max(map(max, self.calls)))}


async def patient(completions, answer):
    """Does not apply to odd answers."""
    await asyncio.sleep(0.001)
    return [None if a % 2 else 0.1 * float(text[-1]) for text, a in zip(completions, answer)]


def fragile(completions, answer):
    if 3 in answer:
        raise KeyError("three")
    return [0.7] * len(answer)


def phases_of(check=lambda: None):
    return Phases(Console(False, file=io.StringIO()), PhaseTimer(), check=check)


def collect(engine, rewards, overlap=True, phases=None, collector=None):
    collector = collector or Collector(engine, Tokenizer(), rewards, overlap)
    return collector.collect(PROMPTS, GROUP, SamplingParams(), 0, phases or phases_of())


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


class Service:
    """An async reward that answers when it is let; keeps the groups of each call, and what became of it."""

    __name__ = "service"

    def __init__(self):
        self.calls, self.answered, self.running, self.most, self.cancelled = [], [], 0, 0, 0
        self.go_on = threading.Event()

    async def __call__(self, completions, answer):
        self.calls.append(sorted(set(answer)))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.go_on.is_set():
                await asyncio.sleep(0.002)
            self.answered.append(sorted(set(answer)))
            return [float(a) for a in answer]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def wait_for_calls(self, count):
        deadline = time.monotonic() + 20
        while len(self.calls) < count:
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.002)


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


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "has not come about"
        time.sleep(0.002)


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


def bounded(seconds=20):
    """Phases that end with an error what hangs while somebody waits for rewards."""
    deadline = time.monotonic() + seconds

    def check():
        assert time.monotonic() < deadline, "hangs"

    return phases_of(check)


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


# ------------------------------------------------------------------ whole runs


def test_rewards_begin_before_the_last_group_has_ended(tmp_path, monkeypatch):
    """With the native engine: generation goes on only when a reward has been called. Else it is called once, after."""
    begun, generated = threading.Event(), []

    def watched(completions, **columns):
        begun.set()
        calls.append((len(completions), bool(generated)))
        return digits(completions)

    for overlap in (True, False):
        calls: list = []
        changes = {"rewards": RewardsConfig(overlap=overlap), "rollout": RolloutConfig(max_slots=4)}
        config = tiny_config(tmp_path / str(overlap), generation_batch_size=16, max_steps=1, **changes)
        trainer = RLTrainer(config=config, reward_funcs=watched, train_dataset=ROWS)
        generate = trainer.engine.generate

        def waiting(requests, sampling, on_progress, on_finished=None, generate=generate, overlap=overlap):
            def progress(done, total):
                # Not at the last chunk: groups of 4 in 4 slots end one after the other.
                assert not overlap or not 4 <= done < total or begun.wait(20), "not called while others are generated"
                on_progress(done, total)

            generated.clear()
            completions = generate(requests, sampling, progress, on_finished)
            generated.append(True)
            return completions

        monkeypatch.setattr(
            trainer.engine, "generate", (lambda r, s, **o: waiting(r, s, **o)) if not overlap else waiting
        )
        trainer.train()
        trainer.close()
        (record,) = [r for r in read_metrics(trainer.folder.metrics) if "reward" in r]
        if overlap:
            assert calls[0] == (4, False)
            assert record["time/rewards_overlapped"] > 0
        else:
            assert calls == [(16, True)]
            assert "time/rewards_overlapped" not in record


class Strict:
    """Takes nothing that is too long, and does not apply to an even answer."""

    __name__ = "strict"

    def __init__(self):
        self._seen = []

    def __call__(self, completions, completion_ids, answer):
        self._seen += map(len, completion_ids)
        return [None if int(a) % 2 == 0 else float(len(text) < 4) for text, a in zip(completions, answer)]

    def pop_metrics(self):
        seen, self._seen = self._seen, []
        return {"mean_tokens": sum(seen) / len(seen)}


async def asked(prompts, completions):
    await asyncio.sleep(0.002)
    return [len(set(text) & set(prompt)) / 8 for text, prompt in zip(completions, prompts)]


def raises_on_seven(completions):
    if any("7" in text for text in completions):
        raise ValueError("seven")
    return [0.25] * len(completions)


def test_a_run_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    """Dynamic sampling, a greedy baseline and evaluation; rewards of every kind. And rewards do overlap."""
    called = threading.Event()

    def counted(completions):
        calls.append(len(completions))
        called.set()
        return digits(completions)

    def generate_until_called(generate):
        """Generation that goes on after the first group when that is with the rewards."""

        def told(on_finished):
            def tell(place, completions):
                on_finished(place, completions)
                assert called.wait(20), "not called while others are generated"

            return tell

        def generating(*arguments):
            called.clear()
            return generate(*arguments[:3], told(arguments[3]))

        return generating

    runs, counts = [], []
    for overlap in (False, True):
        config = tiny_config(
            tmp_path / str(overlap),
            rewards=RewardsConfig(overlap=overlap, on_error="none"),
            rollout=RolloutConfig(max_slots=4, decode_chunk=1),
            reward_weights=[1.0, 0.7, 0.3, 0.1],
            algorithm=AlgorithmConfig(recipe="remax", dynamic_sampling=True, running_norm="standardize"),
            generation_batch_size=16,
            max_steps=4,
            eval_steps=2,
        )
        calls: list = []
        functions = [counted, Strict(), asked, raises_on_seven]
        trainer = RLTrainer(config=config, reward_funcs=functions, train_dataset=ROWS[:16], eval_dataset=ROWS[16:])
        if overlap:
            monkeypatch.setattr(trainer.engine, "generate", generate_until_called(trainer.engine.generate))
        trainer.train()
        trainer.close()
        moving = ("time", "compiles", "tokens_per_second", "peak_memory")
        measured = read_metrics(trainer.folder.metrics)
        records = [{k: v for k, v in record.items() if not k.startswith(moving)} for record in measured]
        completions = read_completions(trainer.folder.path)
        runs.append((records, completions, jax.tree.map(np.asarray, jax.tree.leaves(trainer.learner.state.params))))
        counts.append((len(calls), any(record.get("time/rewards_overlapped", 0) > 0 for record in measured)))
    (records, completions, params), (others, other_completions, other_params) = runs
    (whole, _), (several, overlapped) = counts
    assert several > whole
    assert overlapped
    assert sum(record.get("rewards/errors", 0) for record in records) > 0
    np.testing.assert_equal(others, records)
    assert other_completions == completions
    for one, other in zip(params, other_params, strict=True):
        np.testing.assert_array_equal(one, other)
