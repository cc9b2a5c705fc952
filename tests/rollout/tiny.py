"""A random model with sharp distributions, and prompts for it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrft.models import Decoder, DecoderSpec, token_logprobs
from jaxrft.rollout import Completion, Request, SamplingParams
from jaxrft.rollout.buckets import power_of_two
from jaxrft.rollout.sampling import sampling_values

VOCAB = 17
EOS = 3
SPEC = DecoderSpec(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=512,
    tie_embeddings=True,
    qkv_bias=True,
)


jitted_logprobs = nnx.jit(token_logprobs)


def random_model(seed: int = 0, spec: DecoderSpec = SPEC, dtype=jnp.float32) -> Decoder:
    """Weights far larger than at a usual start, so that tokens differ in probability and depend on the context."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(spec, dtype=dtype, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def value(path, x):
        center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(center + 0.4 * rng.standard_normal(x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, params))


def random_requests(count: int, *, seed: int = 0, longest: int = 12, largest: int = 4) -> list[Request]:
    """Prompts of 1 to ``longest`` tokens in groups of 1 to ``largest``; each has its own seed."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt_ids=rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist(),
            n=int(rng.integers(1, largest + 1)),
            seed=int(rng.integers(2**40)),
        )
        for _ in range(count)
    ]


def prompts_of(requests: Sequence[Request]) -> list[list[int]]:
    """The prompt of each completion."""
    return [request.prompt_ids for request in requests for _ in range(request.n)]


def forward_logprobs(model, prompts, completions: Sequence[Completion], temperatures) -> list[np.ndarray]:
    """What the trainer's forward gives each completion's tokens; ``temperatures`` is one number, or a pair
    of the first token's and the others'."""
    first, other = temperatures if isinstance(temperatures, tuple) else (temperatures, temperatures)
    rows = [prompt + completion.token_ids for prompt, completion in zip(prompts, completions)]
    # Few shapes, so that few programs are compiled.
    tokens = np.zeros((power_of_two(len(rows)), power_of_two(max(map(len, rows)))), np.int32)
    lengths = np.array([*map(len, rows), *[1] * (len(tokens) - len(rows))], np.int32)
    by_token = np.full((len(tokens), tokens.shape[1] - 1), other, np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        by_token[i, len(prompts[i]) - 1] = first
    logprobs = np.asarray(jitted_logprobs(model, tokens, lengths, by_token)[0])
    return [logprobs[i, len(prompts[i]) - 1 : len(row) - 1] for i, row in enumerate(rows)]


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def own_leaves(programs, leaves, dtype):
    """The parameters that an engine generates from, of those that it is given."""
    values = sampling_values(SamplingParams(), (EOS,))
    return programs.begin(tuple(leaves), values, slots=1, length=16, dtype=jnp.dtype(dtype))[0]
