"""The engine's log-probabilities are the trainer's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.rollout import NativeEngine, Request, SamplingParams
from tests.rollout.tiny import EOS, forward_logprobs, prompts_of, random_model, random_requests


@pytest.mark.parametrize(
    ("options", "temperatures"),
    [
        # Up to 60 new tokens cross the buckets of 16, 24, 32, 48 and 64.
        ({"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}, 1.0),
        ({"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_tokens": 5}, 0.7),
        ({"temperature": 0.7, "first_token_temperature": 3.0}, (3.0, 0.7)),
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 0.0, "first_token_temperature": 2.0}, (2.0, 1.0)),
    ],
)
def test_equal_the_trainers_forward(model, options, temperatures) -> None:
    requests = [Request(prompt_ids=[5], n=2), *random_requests(7)]
    sampling = SamplingParams(seed=1, **{"max_tokens": 18, **options})
    with NativeEngine(model, max_slots=8, max_length=96, eos_token_ids=[EOS]) as engine:
        completions = engine.generate(requests, sampling)
    assert len(completions) == sum(request.n for request in requests)
    assert max(len(completion.token_ids) for completion in completions) > 0.7 * sampling.max_tokens
    for completion, logprobs in zip(
        completions, forward_logprobs(model, prompts_of(requests), completions, temperatures)
    ):
        assert completion.logprobs.dtype == completion.sampled_logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        if not sampling.ignore_eos:
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
            assert EOS not in completion.token_ids[:-1]
        if sampling.temperature == 1.0:
            np.testing.assert_array_equal(completion.sampled_logprobs, completion.logprobs)
        if sampling.temperature == 0.0:
            assert not completion.sampled_logprobs[1:].any()


def test_in_bfloat16() -> None:
    model, requests = random_model(1, dtype=jnp.bfloat16), random_requests(4)
    with NativeEngine(model, max_slots=8, max_length=24) as engine:
        completions = engine.generate(requests, SamplingParams(max_tokens=8))
    for completion, logprobs in zip(completions, forward_logprobs(model, prompts_of(requests), completions, 1.0)):
        assert completion.logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=0.15)
