"""What benchmarks/train_step.py measures: shapes of models, ragged samples, and how many FLOPs a step of them is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.models.precision import matmul_precision
from jaxrft.models.spec import DecoderSpec
from jaxrft.training.batch import Sample

FLOPS = (
    "6 x (parameters of the layers' kernels x valid tokens + parameters of the output projection x response tokens) "
    "+ 12 x layers x heads x head_dim x (sum of squared sample lengths) / 2. Padding, what rematerialisation computes "
    "again, norms and the optimizer do not count."
)

_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
# Qwen2.5's, but for 0.6B, which is Qwen3's; those without a size in their name are for a CPU.
_SHAPES = {
    "tiny": (256, 64, 128, 2, 4, 2, True),
    "small": (8192, 256, 1024, 4, 4, 2, True),
    "0.5B": (151936, 896, 4864, 24, 14, 2, True),
    "0.6B": (151936, 1024, 3072, 28, 16, 8, True),
    "1.5B": (151936, 1536, 8960, 28, 12, 2, True),
    "3B": (151936, 2048, 11008, 36, 16, 2, True),
    "7B": (152064, 3584, 18944, 28, 28, 4, False),
}
_QWEN3 = {"0.6B": {"model_type": "qwen3", "head_dim": 128, "attention_bias": False}}
SHAPES = tuple(_SHAPES)


def hf_config(shape: str, length: int) -> dict[str, Any]:
    """Fields of a config.json, with room for ``length`` tokens."""
    fields = dict(zip(_FIELDS, _SHAPES[shape])) | _QWEN3.get(shape, {"model_type": "qwen2"})
    return {"max_position_embeddings": max(32768, length), "rope_theta": 1e6, **fields}


def prompt_room(length: int) -> int:
    """Tokens of ``length`` that prompts may take; the rest is for responses."""
    return max(1, length // 4)


def make_samples(count: int, length: int, vocab: int, seed: int = 0) -> list[Sample]:
    """Random samples of at most ``length`` tokens; the first has that many.

    Prompts take an eighth to a quarter of it, evenly distributed; responses an eighth of the rest to all of it, evenly
    in their logarithm, so that most are short and a few long.
    """
    rng = np.random.default_rng(seed)
    prompts = prompt_room(length)
    responses = length - prompts
    samples = []
    for number in range(count):
        prompt = int(rng.integers(-(-prompts // 2), prompts + 1)) if number else prompts
        response = max(1, round(responses * 8 ** -rng.random())) if number else responses
        samples.append(
            Sample(
                prompt_ids=rng.integers(0, vocab, prompt).tolist(),
                response_ids=rng.integers(0, vocab, response).tolist(),
                logprobs=np.full(response, -math.log(vocab), np.float32),
                advantage=float(rng.normal()),
                group=number,
            )
        )
    return samples


def matmul_parameters(spec: DecoderSpec) -> tuple[int, int]:
    """Parameters that take part in matrix products: those of all layers, and of the output projection."""
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    feed_forward = 3 * spec.hidden_size * spec.intermediate_size
    return spec.num_layers * (attention + feed_forward), spec.hidden_size * spec.vocab_size


def model_flops(spec: DecoderSpec, samples: Sequence[Sample]) -> float:
    """Of one optimizer step on these samples, as :data:`FLOPS` says (arXiv:2204.02311, appendix B)."""
    layers, head = matmul_parameters(spec)
    tokens = sum(s.length for s in samples)
    responses = sum(len(s.response_ids) for s in samples)
    squares = sum(s.length**2 for s in samples)
    attention = 12 * spec.num_layers * spec.num_heads * spec.head_dim * squares / 2
    return 6.0 * (layers * tokens + head * responses) + attention


def matmul_ceiling(dtype: str, size: int | None = None, repeats: int = 5) -> dict[str, Any]:
    """FLOPs per second of square matrix products on the first device: the best of several chains of them.

    In float32 the products are of full precision, as the model's are.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, chain = size or (1024 if on_cpu else 8192), 4 if on_cpu else 16
    keys = jax.random.split(jax.random.key(0))
    # Of this scale products neither grow nor vanish along the chain.
    x, w = (jax.random.normal(key, (size, size)) for key in keys)
    x, w = x.astype(dtype), (w * size**-0.5).astype(dtype)
    precision = matmul_precision(jnp.dtype(dtype))

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, chain, lambda _, y: jnp.matmul(y, w, precision=precision), x)

    jax.block_until_ready(run(x, w))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(x, w))
        seconds.append(time.perf_counter() - start)
    return {"size": size, "flops_per_second": 2 * size**3 * chain / min(seconds), "seconds": seconds}
