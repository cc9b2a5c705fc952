"""How fast a device copies memory, and how long a decode step takes at least at that speed."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxrft.models.spec import DecoderSpec


def copy_bandwidth(megabytes: int | None = None, repeats: int = 10) -> dict[str, Any]:
    """Bytes per second that the first device reads and writes in a copy, both counted: the best of several turns.

    On a GPU a turn is ten copies, of which the last is waited for: a single one has the host's time in it.
    """
    size = megabytes or (128 if jax.default_backend() == "cpu" else 2048)
    # Not a bare copy, which a compiler may leave out.
    copy = jax.jit(lambda x: x + jnp.uint32(1), donate_argnums=0)
    # In place: a host would spend most of the time on pages for a new result.
    source = jax.block_until_ready(copy(jnp.zeros((size * 2**18,), jnp.uint32)))
    seconds, calls = [], 1 if jax.default_backend() == "cpu" else 10
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            source = copy(source)
        jax.block_until_ready(source)
        seconds.append((time.perf_counter() - start) / calls)
    return {"bytes": 2 * source.nbytes, "seconds": seconds, "bytes_per_second": 2 * source.nbytes / min(seconds)}


def decode_step_bytes(
    spec: DecoderSpec,
    *,
    completions: int,
    slots: int,
    prompt_length: int,
    response_length: int,
    dtype: str,
    kernel_dtype: str | None = None,
) -> dict[str, float]:
    """Bytes that one token of every completion needs read, on average over the response.

    Weights are read once for all slots together, in the type of the computation; an embedding that is not the output
    projection too is not read whole, and not counted. Keys and values are read as far as they are filled.

    Args:
        spec: of the model.
        completions: generated in all.
        slots: at the same time; more completions than these need the weights again.
        dtype: of the computation.
        kernel_dtype: of the layers' kernels, where they are kept in another.
    """
    width = jnp.dtype(dtype).itemsize
    kernel_width = jnp.dtype(kernel_dtype or dtype).itemsize
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    layers = spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)
    whole = layers * kernel_width + spec.hidden_size * spec.vocab_size * width
    weights = whole * math.ceil(completions / slots)
    token = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * width
    return {"weights": weights, "cache": completions * token * (prompt_length + response_length / 2)}
