"""The engine's log-probabilities are the trainer's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.models import DecoderSpec
from jaxrft.rollout import NativeEngine, Request, SamplingParams
from tests.rollout.tiny import EOS, VOCAB, forward_logprobs, prompts_of, random_model, random_requests


@pytest.mark.parametrize(
    ("options", "temperatures"),
    [
        ({"temperature": 1.0}, 1.0),
        ({"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_tokens": 5}, 0.7),
        ({"temperature": 0.7, "first_token_temperature": 3.0}, (3.0, 0.7)),
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 0.0, "first_token_temperature": 2.0}, (2.0, 1.0)),
    ],
)
def test_equal_the_trainers_forward(model, options, temperatures) -> None:
    # Prompts of 1 to 20 tokens and up to 60 new ones cross the buckets of 16, 24, 32, 48 and 64.
    requests = [Request(prompt_ids=[5], n=2), *random_requests(7)]
    sampling = SamplingParams(max_tokens=60, seed=1, **options)
    with NativeEngine(model, max_slots=8, max_length=96, eos_token_ids=[EOS]) as engine:
        completions = engine.generate(requests, sampling)
    expected = forward_logprobs(model, prompts_of(requests), completions, temperatures)
    assert len(completions) == sum(request.n for request in requests)
    assert max(len(completion.token_ids) for completion in completions) > 40
    for completion, logprobs in zip(completions, expected):
        assert completion.logprobs.dtype == completion.sampled_logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
        assert EOS not in completion.token_ids[:-1]
        if sampling.temperature == 1.0:
            np.testing.assert_array_equal(completion.sampled_logprobs, completion.logprobs)
        if sampling.temperature == 0.0:
            assert not completion.sampled_logprobs[1:].any()


def test_sliding_windows_and_bfloat16() -> None:
    spec = DecoderSpec(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=128,
        sliding_windows=(5, None),
        qk_norm=True,
    )
    requests = random_requests(4, longest=12)
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.15)):
        model = random_model(1, spec, dtype)
        with NativeEngine(model, max_length=64) as engine:
            completions = engine.generate(requests, SamplingParams(max_tokens=24))
        expected = forward_logprobs(model, prompts_of(requests), completions, 1.0)
        for completion, logprobs in zip(completions, expected):
            assert completion.logprobs.dtype == np.float32
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=tolerance)
