"""Bad input ends in one line that says what was wrong and what to do; an engine at rest says so."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from jaxrft.config import ConfigError
from jaxrft.rollout import NativeEngine, Request, SamplingParams
from tests.rollout.tiny import VOCAB, random_model, tokens_of

GOOD = Request(prompt_ids=[1, 2], n=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, r"temperature: got -1.0, takes 0 \(greedy\) or a number of at least 0.001"),
        ({"temperature": 1e-9}, "temperature: got 1e-09"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"first_token_temperature": 0.0}, "first_token_temperature: got 0.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_k": 2.5}, "top_k: got 2.5"),
        ({"min_p": 1.5}, "min_p: got 1.5"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens: got 5, takes an integer from 0 to max_tokens \(4\)"),
        ({"stop": "</s>"}, "stop: got '</s>', takes a list"),
        ({"stop": ("",)}, "stop: got"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: got"),
        ({"seed": 1.5}, "seed: got 1.5"),
    ],
)
def test_sampling_values_out_of_range(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**fields)


def test_requests_without_a_prompt_or_completions() -> None:
    with pytest.raises(ConfigError, match="prompt_ids: got an empty prompt, takes at least one token"):
        Request(prompt_ids=[])
    with pytest.raises(ConfigError, match="n: got 0, takes an integer of at least 1"):
        Request(prompt_ids=[1], n=0)


@pytest.mark.parametrize(
    ("request_", "sampling", "message"),
    [
        (
            Request(prompt_ids=[1] * 32),
            {},
            "request 1: its prompt has 32 tokens, this engine takes at most 31.*max_length",
        ),
        (
            Request(prompt_ids=[1, VOCAB]),
            {},
            f"request 1: its prompt holds token {VOCAB}, the model has tokens 0 to 16",
        ),
        (Request(prompt_ids=[-1]), {}, "request 1: its prompt holds token -1"),
        (GOOD, {"stop": ["\n"]}, "stop: texts need an engine with a tokenizer"),
        (GOOD, {"stop_token_ids": [VOCAB]}, f"stop token {VOCAB}"),
        (GOOD, {"stop_token_ids": list(range(VOCAB)), "min_tokens": 1}, "min_tokens: every"),
    ],
)
def test_refused_by_the_engine(model, request_, sampling, message) -> None:
    with NativeEngine(model, max_length=32) as engine:
        with pytest.raises(ConfigError, match=message):
            engine.generate([GOOD, request_], SamplingParams(max_tokens=4, **sampling))
        assert len(engine.generate([GOOD], SamplingParams(max_tokens=4))) == 8


@pytest.mark.parametrize(
    "options",
    [{"max_slots": 0}, {"max_length": 1}, {"decode_chunk": 0}, {"max_prefill_tokens": 0}, {"max_prompt_length": 0}],
)
def test_engine_options_out_of_range(model, options) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: got"):
        NativeEngine(model, **options)


def test_weights_of_another_model_are_refused(model) -> None:
    with (
        NativeEngine(model) as engine,
        pytest.raises(ConfigError, match="params: not the state of this engine's model"),
    ):
        engine.update_weights({"a": np.zeros(3)}, 1)


def test_sleep_wake_close(model) -> None:
    sampling = SamplingParams(max_tokens=6)
    engine = NativeEngine(model, max_slots=8, max_length=32)
    expected = tokens_of(engine.generate([GOOD], sampling))
    engine.sleep()
    with pytest.raises(RuntimeError, match=r"asleep \(kv_cache\): call wake\(\)"):
        engine.generate([GOOD], sampling)
    engine.wake()
    assert tokens_of(engine.generate([GOOD], sampling)) == expected

    engine.sleep(level=2)
    engine.wake(tags=["weights"])
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate([GOOD], sampling)
    engine.wake(tags=["kv_cache"])
    with pytest.raises(RuntimeError, match=r"sleep\(level=2\): call update_weights"):
        engine.generate([GOOD], sampling)
    engine.update_weights(nnx.split(random_model())[1], version=2)
    assert tokens_of(engine.generate([GOOD], sampling)) == expected

    with pytest.raises(ConfigError, match="level: got 3"):
        engine.sleep(level=3)
    with pytest.raises(ConfigError, match=r"tags: got \['everything'\]"):
        engine.wake(tags=["everything"])
    engine.close()
    engine.close()
    for use in (lambda: engine.generate([GOOD], sampling), engine.sleep, engine.wake):
        with pytest.raises(RuntimeError, match="closed"):
            use()
