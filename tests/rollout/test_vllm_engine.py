"""The vLLM engine against a real server: one start serves all tests of this file."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from flax import nnx

from jaxrft.config import ConfigError, RolloutConfig, VLLMConfig
from jaxrft.rollout import EngineError, NativeEngine, Request, SamplingParams
from jaxrft.rollout.transfer.export import Exporter
from tests.rollout.servers import (
    MAX_LENGTH,
    SPEC,
    TOKENIZER,
    connect,
    group_members,
    models,
    running,
    vllm_python,
)
from tests.rollout.tiny import forward_logprobs, prompts_of, tokens_of

EOS = TOKENIZER.eos_token_id
FREE = SamplingParams(max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with running(tmp_path_factory.mktemp("vllm"), models(1)[0], python=vllm_python()) as started:
        yield started


@pytest.fixture(scope="module")
def engine(processes):
    # Buckets so small that the weights take several.
    with connect(processes, models(1)[0], bucket_bytes=2**16, checksum=True) as connected:
        yield connected


@pytest.fixture
def ready(engine):
    """The engine with the weights of model 0."""
    model = models(1)[0]
    engine.update_weights(nnx.state(model), 0)
    return engine, model


def requests(count: int, n: int = 1, longest: int = 9) -> list[Request]:
    rng = np.random.default_rng(count)
    lengths = rng.integers(1, longest + 1, count)
    return [
        Request(prompt_ids=rng.integers(2, len(TOKENIZER), length).tolist(), n=n, seed=100 + i)
        for i, length in enumerate(lengths)
    ]


def largest_gap(model, asked, completions, temperature=1.0) -> float:
    expected = forward_logprobs(model, prompts_of(asked), completions, temperature)
    return max(float(np.abs(e - c.logprobs).max()) for e, c in zip(expected, completions) if len(e))


def test_refuses_until_weights_have_come(processes):
    """The first test: the server is new. It refuses by itself, and asks everybody for the key."""
    with connect(processes, models(1)[0]) as engine, pytest.raises(EngineError, match="no whole weights"):
        engine.generate(requests(1), FREE)
    body = {"token_ids": [3], "sampling_params": {"max_tokens": 1}}
    key = {"Authorization": f"Bearer {processes[0].options.key}"}
    reply = httpx.post(f"{processes[0].url}/inference/v1/generate", json=body, headers=key)
    assert reply.status_code == 503
    assert "no weights have come yet" in reply.text
    for path in ("/collective_rpc", "/pause", "/jaxrft/state", "/inference/v1/generate", "/v1/completions"):
        assert httpx.post(processes[0].url + path, json={}).status_code == 401, path


def test_logprobs_are_the_trainers_after_each_of_several_updates(engine):
    asked = requests(12, n=2)
    for version, model in enumerate(models(3), start=5):
        engine.update_weights(nnx.state(model), version)
        completions = engine.generate(asked, FREE)
        assert largest_gap(model, asked, completions) < 1e-4
        assert {c.versions for c in completions} == {((0, version),)}
        assert engine.version == version
    parameters = sum(x.size for x in nnx.state(model).flat_state().leaves) + SPEC.vocab_size * SPEC.hidden_size
    assert engine.last_transfer.bytes == 4 * parameters
    assert engine.last_transfer.buckets > 3
    assert engine.transport == "shared_memory"


def test_greedy_completions_are_the_native_engines(ready):
    engine, model = ready
    asked, greedy = requests(10), SamplingParams(temperature=0.0, max_tokens=20)
    with NativeEngine(model, TOKENIZER, max_length=MAX_LENGTH) as native:
        expected = native.generate(asked, greedy)
    found = engine.generate(asked, greedy)
    assert tokens_of(found) == tokens_of(expected)
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    assert {"stop", "length"} == {c.finish_reason for c in found}
    assert largest_gap(model, asked, found) < 1e-4
    assert not any(c.sampled_logprobs.any() for c in found)


def test_completions_depend_on_their_seeds_alone(ready):
    engine, _ = ready
    asked = requests(8, n=4)
    alone = [c for request in asked for c in engine.generate([request], FREE)]
    together = tokens_of(engine.generate(asked, FREE))
    assert together == tokens_of(alone)
    assert len({tuple(t) for t in together}) > 16
    assert tokens_of(engine.generate(asked, SamplingParams(max_tokens=12, seed=4))) != together


def test_tokens_are_drawn_from_the_models_distribution(ready):
    """2048 first tokens; half of them at a temperature of 0.5, whose raw log-probabilities are not the trainer's."""
    engine, model = ready
    prompt = [4, 12, 7]
    for temperature in (1.0, 0.5):
        sampling = SamplingParams(temperature=temperature, max_tokens=1, seed=11)
        drawn = engine.generate([Request(prompt_ids=prompt, n=64, seed=i) for i in range(16)], sampling)
        counts = np.bincount([c.token_ids[0] for c in drawn], minlength=SPEC.vocab_size)
        logits = np.asarray(model(np.array([prompt])), np.float64)[0, -1] / temperature
        expected = len(drawn) * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        common = expected > 5
        chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
        assert chi_square < 40, (temperature, chi_square)
        assert (drawn[0].logprobs is None) == (temperature != 1.0)


def test_truncation_keeps_logprobs_at_temperature_one(ready):
    engine, model = ready
    asked = requests(6, n=2)
    completions = engine.generate(asked, SamplingParams(top_k=2, max_tokens=10, seed=1))
    assert largest_gap(model, asked, completions) < 1e-4
    assert all(c.sampled_logprobs is None for c in completions)
    for prompt, completion in zip(prompts_of(asked), completions):
        row = np.array([prompt + completion.token_ids])
        logits = np.asarray(model(row))[0, len(prompt) - 1 : -1]
        ranks = (logits > np.take_along_axis(logits, np.array(completion.token_ids)[:, None], 1)).sum(1)
        assert ranks.max() < 2


def test_stops(ready):
    """Stop tokens and texts stay in the completion; none counts before ``min_tokens``; the longest length ends it."""
    engine, _ = ready
    asked = requests(12, n=4)
    plain = engine.generate(asked, SamplingParams(max_tokens=24, seed=5, min_tokens=3))
    texts = [TOKENIZER.decode(c.token_ids) for c in plain]
    pairs = {t[i : i + 2] for t in texts for i in range(2, 10) if t[i : i + 2].isdigit() and len(t) > i + 1}
    stop = max(pairs, key=lambda s: sum(s in t for t in texts))
    stopped = engine.generate(asked, SamplingParams(max_tokens=24, seed=5, min_tokens=3, stop=(stop,)))
    seen = 0
    for completion, text in zip(stopped, texts):
        # Digits are a token each; a stop that ends within the first three tokens does not count.
        end = text.find(stop, 2)
        if end >= 0:
            seen += 1
            assert completion.finish_reason == "stop"
            assert TOKENIZER.decode(completion.token_ids) == text[: end + len(stop)]
            assert len(completion.logprobs) == len(completion.token_ids)
    assert seen >= 4
    by_token = engine.generate(asked, SamplingParams(max_tokens=24, seed=5, stop_token_ids=(5, 6), min_tokens=2))
    for completion in by_token:
        ends = [i for i, t in enumerate(completion.token_ids) if t in (5, 6, EOS)]
        assert ends in ([], [len(completion.token_ids) - 1])
        assert not ends or (ends[0] >= 2 and completion.finish_reason == "stop")
    long = Request(prompt_ids=[3] * (MAX_LENGTH - 2), n=2)
    for completion in engine.generate([long], SamplingParams(max_tokens=24, ignore_eos=True)):
        assert (len(completion.token_ids), completion.finish_reason) == (2, "length")


def test_first_tokens_at_a_temperature_of_their_own(ready):
    engine, model = ready
    asked = requests(6, n=3)
    sampling = SamplingParams(max_tokens=10, seed=2, first_token_temperature=2.0, min_tokens=2)
    done = []
    completions = engine.generate(asked, sampling, on_progress=lambda *now: done.append(now))
    assert len(completions) == 18
    assert done[-1] == (18, 18)
    assert len({c.token_ids[0] for c in completions}) > 6
    assert all(c.logprobs is None and len(c.token_ids) >= 2 for c in completions)
    again = engine.generate(asked, sampling)
    assert tokens_of(again) == tokens_of(completions)
    with_one = engine.generate(asked, SamplingParams(max_tokens=10, seed=2, first_token_temperature=1.0))
    assert largest_gap(model, asked, with_one) < 1e-4


def test_a_broken_transfer_is_refused_and_repaired(ready, processes, monkeypatch):
    engine, old = ready
    new, pack, calls = models(2)[1], Exporter.pack, []

    def breaks(self, bucket, values):
        calls.append(bucket)
        if len(calls) == 3:
            raise MemoryError("in the middle")
        return pack(self, bucket, values)

    with monkeypatch.context() as patched:
        patched.setattr(Exporter, "pack", breaks)
        with pytest.raises(MemoryError):
            engine.update_weights(nnx.state(new), 1)
    with pytest.raises(EngineError, match="again where it failed"):
        engine.generate(requests(1), FREE)
    body = {"token_ids": [3], "sampling_params": {"max_tokens": 1}}
    key = {"Authorization": f"Bearer {processes[0].options.key}"}
    reply = httpx.post(f"{processes[0].url}/inference/v1/generate", json=body, headers=key)
    assert reply.status_code == 503
    assert "has not been completed" in reply.text
    asked = requests(6)
    for version, model in ((2, new), (3, old)):
        engine.update_weights(nnx.state(model), version)
        completions = engine.generate(asked, FREE)
        assert largest_gap(model, asked, completions) < 1e-4
        assert {c.versions for c in completions} == {((0, version),)}


def test_another_models_weights_are_refused_before_the_first_byte(ready, processes):
    engine, model = ready
    wrong = {
        "wider": ({"intermediate_size": 128}, "gate_proj"),
        "deeper": ({"num_layers": 3}, r"layers\.2"),
        "without biases": ({"qkv_bias": False}, r"qkv_proj\.bias would not be filled"),
    }
    for change, said in wrong.values():
        other = models(1, dataclasses.replace(SPEC, **change))[0]
        with connect(processes, other) as second, pytest.raises(EngineError, match=said):
            second.update_weights(nnx.state(other), 9)
    asked = requests(4)
    assert largest_gap(model, asked, engine.generate(asked, FREE)) < 1e-4
    with pytest.raises(ConfigError, match="takes 48 tokens"):
        connect(processes, model, max_length=MAX_LENGTH + 1)


def test_partial_results_on_abort(ready):
    """A generation that another thread ends returns what there is."""
    engine, _ = ready
    asked = [Request(prompt_ids=[5], n=8, seed=i) for i in range(64)]
    sampling = SamplingParams(max_tokens=MAX_LENGTH - 2, ignore_eos=True)
    timer = threading.Timer(0.7, engine.abort)
    timer.start()
    completions = engine.generate(asked, sampling)
    timer.join()
    assert len(completions) == 512
    ended = {c.finish_reason for c in completions}
    assert "abort" in ended
    assert all(len(c.token_ids) == MAX_LENGTH - 2 for c in completions if c.finish_reason == "length")
    assert all(len(c.logprobs) == len(c.token_ids) for c in completions)
    assert any(c.finish_reason == "abort" and not c.token_ids for c in completions)
    again = engine.generate(asked[:2], sampling)
    assert {c.finish_reason for c in again} == {"length"}


def test_what_progress_raises_ends_the_requests(ready):
    engine, _ = ready

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    asked = [Request(prompt_ids=[5], n=8, seed=i) for i in range(64)]
    start = time.monotonic()
    with pytest.raises(Stop):
        engine.generate(asked, SamplingParams(max_tokens=MAX_LENGTH - 2, ignore_eos=True), on_progress=stop)
    assert time.monotonic() - start < 60
    assert len(engine.generate(asked[:1], FREE)) == 8


def test_a_run_on_a_server_that_runs_already(processes, tmp_path, monkeypatch):
    """Its address and key are all that is needed; the server is none of the run's own, and goes on after it."""
    from jaxrft import RLTrainer
    from tests.training.tiny import digits, tiny_config

    monkeypatch.setenv("JAXRFT_VLLM_API_KEY", processes[0].options.key)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
    rollout = RolloutConfig(engine="vllm", vllm=VLLMConfig(urls=[processes[0].url]), parity="always")
    config = tiny_config(
        tmp_path / "run", rollout=rollout, max_steps=3, max_prompt_length=8, max_completion_length=8, beta=0.05
    )
    trainer = RLTrainer(models(1)[0], config=config, reward_funcs=digits, train_dataset=rows, tokenizer=TOKENIZER)
    metrics = trainer.train()
    trainer.close()
    assert metrics["sampling/logprob_difference/max"] < 1e-4
    assert metrics["weights/bytes"] > 0
    assert metrics["weights/seconds"] > 0
    monkeypatch.setenv("JAXRFT_VLLM_API_KEY", "another")
    with pytest.raises(ConfigError, match="JAXRFT_VLLM_API_KEY"):
        RLTrainer(
            models(1)[0],
            config=tiny_config(tmp_path / "other", rollout=rollout, max_prompt_length=8, max_completion_length=8),
            reward_funcs=digits,
            train_dataset=rows,
            tokenizer=TOKENIZER,
        )
    assert httpx.get(f"{processes[0].url}/health").status_code == 200
    # What a server is asked to wake it up.
    bearer = {"Authorization": f"Bearer {processes[0].options.key}"}
    assert httpx.get(f"{processes[0].url}/is_sleeping", headers=bearer).json() == {"is_sleeping": False}


def test_nothing_is_left(engine, processes):
    """The last test: no name in shared memory, and a server that is ended leaves no process."""
    assert not list(Path("/dev/shm").glob(f"jaxrft-{os.getpid()}-*"))
    processes[0].stop()
    with pytest.raises(EngineError, match="no answer"):
        engine.update_weights(nnx.state(models(1)[0]), 1)
    assert not group_members(processes[0])
