"""Whole runs whose rewards overlap with generation."""

import asyncio
import threading

import jax
import numpy as np

from jaxrft import RLTrainer
from jaxrft.config import AlgorithmConfig, RewardsConfig, RolloutConfig
from jaxrft.tracking import read_completions, read_metrics
from tests.training.tiny import ROWS, digits, tiny_config


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
