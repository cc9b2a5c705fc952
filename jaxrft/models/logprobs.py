"""Token log-probabilities and entropies, fused with the output projection.

The logits of all tokens together are never held: chunks of tokens are projected, reduced to
a log-probability and an entropy, and dropped. The gradient projects each chunk again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits alive at a time, in elements: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24


def token_logprobs(
    model: Any,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, "batch"],
    temperature: float | Float[Array, "batch time_minus_1"] = 1.0,
    *,
    positions: Int[Array, "batch time"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    media: Any = None,
) -> tuple[Float[Array, "batch time_minus_1"], Float[Array, "batch time_minus_1"]]:
    """Log-probability of every next token, and the entropy it was drawn with.

    Args:
        model: a module with ``hidden`` and ``output_kernel``.
        tokens: right-padded rows.
        lengths: valid tokens of each row.
        temperature: logits are divided by it; a scalar, or one for each predicted token.
        positions, segment_ids, media: as the model takes them. The first token of a segment
            is not predicted by the segment before it: its place is 0.

    Returns:
        Log-softmax at ``tokens[:, 1:]`` and entropy in nats, float32; 0 past the length.
    """
    hidden = model.hidden(tokens, lengths, positions=positions, segment_ids=segment_ids, media=media)
    valid = jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]
    if segment_ids is not None:
        valid &= segment_ids[:, 1:] == segment_ids[:, :-1]
    shape = valid.shape
    logprobs, entropy = projected_logprobs(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]),
        model.output_kernel,
        tokens[:, 1:].reshape(-1),
        jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), shape).reshape(-1),
    )
    return jnp.where(valid, logprobs.reshape(shape), 0.0), jnp.where(valid, entropy.reshape(shape), 0.0)


def projected_logprobs(
    hidden: Float[Array, "tokens hidden"],
    kernel: Float[Array, "hidden vocab"],
    targets: Int[Array, "tokens"],
    temperature: Float[Array, "tokens"],
    chunk: int | None = None,
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens"]]:
    """Log-probability of ``targets`` and entropy of ``softmax(hidden @ kernel / temperature)``.

    Differentiable with respect to ``hidden`` and ``kernel``, through both results.

    Args:
        chunk: tokens projected at a time; None takes as many as 64 MiB of logits hold.
    """
    count, vocab = hidden.shape[0], kernel.shape[1]
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // vocab)
    chunk = min(chunk, count)
    padding = -count % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))
    temperature = jnp.pad(temperature, (0, padding), constant_values=1.0)
    logprobs, entropy = _projected(hidden, kernel, targets, temperature, chunk)
    return logprobs[:count], entropy[:count]


def _chunk_logits(hidden, kernel, temperature):
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits / temperature[:, None]


def _chunk_forward(hidden, kernel, targets, temperature):
    logits = _chunk_logits(hidden, kernel, temperature)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    shifted = logits - log_normalizer[:, None]
    entropy = -jnp.sum(jnp.exp(shifted) * shifted, axis=-1)
    return target_logits - log_normalizer, entropy, log_normalizer


def _in_chunks(array, chunk):
    return array.reshape(-1, chunk, *array.shape[1:])


def _forward(hidden, kernel, targets, temperature, chunk):
    parts = tuple(_in_chunks(a, chunk) for a in (hidden, targets, temperature))
    if parts[0].shape[0] == 1:
        return _chunk_forward(hidden, kernel, targets, temperature)
    results = jax.lax.map(lambda part: _chunk_forward(part[0], kernel, part[1], part[2]), parts)
    return tuple(r.reshape(-1) for r in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projected(hidden, kernel, targets, temperature, chunk):
    return _forward(hidden, kernel, targets, temperature, chunk)[:2]


def _projected_forward(hidden, kernel, targets, temperature, chunk):
    logprobs, entropy, log_normalizer = _forward(hidden, kernel, targets, temperature, chunk)
    return (logprobs, entropy), (hidden, kernel, targets, temperature, log_normalizer, entropy)


def _projected_backward(chunk, residuals, cotangents):
    hidden, kernel, targets, temperature, log_normalizer, entropy = residuals
    d_logprobs, d_entropy = cotangents
    parts = tuple(
        _in_chunks(a, chunk) for a in (hidden, targets, temperature, log_normalizer, entropy, d_logprobs, d_entropy)
    )

    def one(d_kernel, part):
        d_hidden, d_kernel_part = _chunk_backward(kernel, *part)
        return d_kernel + d_kernel_part, d_hidden

    if parts[0].shape[0] == 1:
        d_hidden, d_kernel = _chunk_backward(kernel, *(p[0] for p in parts))
    else:
        d_kernel, d_hidden = jax.lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), parts)
        d_hidden = d_hidden.reshape(hidden.shape)
    return d_hidden, d_kernel.astype(kernel.dtype), None, None


def _chunk_backward(kernel, hidden, targets, temperature, log_normalizer, entropy, d_logprobs, d_entropy):
    """Cotangents of one chunk.

    With p = softmax(z): d logprob / d z = onehot - p, and d entropy / d z = -p (log p + entropy).
    """
    log_p = _chunk_logits(hidden, kernel, temperature) - log_normalizer[:, None]
    p = jnp.exp(log_p)
    d_logits = -p * (d_logprobs[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    d_logits = d_logits.at[jnp.arange(targets.shape[0]), targets].add(d_logprobs)
    d_logits = (d_logits / temperature[:, None]).astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, kernel.astype(hidden.dtype).T)
    d_kernel = jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_kernel


_projected.defvjp(_projected_forward, _projected_backward)
