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

from jaxrft.models.precision import matmul_precision

# Logits alive at a time, in elements. Each chunk reads the projection, and in the gradient reads and writes
# its float32 cotangent: accelerators want few large chunks, a CPU chunks that its caches still serve.
CHUNK_ELEMENTS = {"cpu": 2**24}
ACCELERATOR_CHUNK_ELEMENTS = 2**27


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
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), valid.shape)
    logprobs, entropy = projected_logprobs(hidden[:, :-1], model.output_kernel, tokens[:, 1:], temperature)
    return jnp.where(valid, logprobs, 0.0), jnp.where(valid, entropy, 0.0)


def projected_logprobs(
    hidden: Float[Array, "*batch time hidden"],
    kernel: Float[Array, "hidden vocab"],
    targets: Int[Array, "*batch time"],
    temperature: Float[Array, "*batch time"],
    chunk: int | None = None,
) -> tuple[Float[Array, "*batch time"], Float[Array, "*batch time"]]:
    """Log-probability of ``targets`` and entropy of ``softmax(hidden @ kernel / temperature)``, float32.

    Differentiable (in reverse mode) with respect to ``hidden`` and ``kernel``, through both results;
    the temperature counts as a constant.

    Args:
        hidden: in its type the projection is computed, with float32 sums. With or without a batch axis:
            chunks are cut along time only, so that a batch axis may be sharded.
        chunk: time steps projected at a time; None takes as many as 64 MiB of logits hold on a CPU,
            512 MiB elsewhere.
    """
    if hidden.ndim == 2:
        logprobs, entropy = projected_logprobs(hidden[None], kernel, targets[None], temperature[None], chunk)
        return logprobs[0], entropy[0]
    batch, time, _ = hidden.shape
    if chunk is None:
        elements = CHUNK_ELEMENTS.get(jax.default_backend(), ACCELERATOR_CHUNK_ELEMENTS)
        chunk = max(1, elements // (kernel.shape[1] * batch))
    chunk = max(1, min(chunk, time))
    padding = -time % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    temperature = jnp.pad(temperature, ((0, 0), (0, padding)), constant_values=1.0)
    logprobs, entropy = _projected(hidden, kernel, targets, temperature, chunk)
    return logprobs[:, :time], entropy[:, :time]


def _split(array: Array, chunk: int) -> Array:
    """[batch, time, ...] -> [chunks, batch * chunk, ...]: each chunk holds some time steps of every row."""
    batch, time, *rest = array.shape
    parts = jnp.moveaxis(array.reshape(batch, time // chunk, chunk, *rest), 1, 0)
    return parts.reshape(time // chunk, batch * chunk, *rest)


def _join(parts: Array, batch: int) -> Array:
    """Undoes :func:`_split`."""
    chunks, size, *rest = parts.shape
    array = jnp.moveaxis(parts.reshape(chunks, batch, size // batch, *rest), 0, 1)
    return array.reshape(batch, chunks * size // batch, *rest)


def _project(hidden, kernel):
    precision = matmul_precision(hidden.dtype)
    return jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=jnp.float32)


def _chunk_forward(kernel, hidden, targets, temperature):
    logits = _project(hidden, kernel)
    # The largest logit is taken off before the division, which compilers round differently in each of its uses:
    # so the largest is exactly 0 everywhere, and sharp distributions keep their digits.
    peak = jnp.max(logits, axis=-1)
    shifted = (logits - peak[:, None]) / temperature[:, None]
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    chosen = jnp.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return chosen - log_total, entropy, peak, log_total


def _forward(hidden, kernel, targets, temperature, chunk):
    # Cast once, not in every chunk.
    kernel = kernel.astype(hidden.dtype)
    parts = [_split(array, chunk) for array in (hidden, targets, temperature)]
    results = jax.lax.map(lambda part: _chunk_forward(kernel, *part), parts)
    return tuple(_join(result, hidden.shape[0]) for result in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projected(hidden, kernel, targets, temperature, chunk):
    return _forward(hidden, kernel, targets, temperature, chunk)[:2]


def _projected_forward(hidden, kernel, targets, temperature, chunk):
    logprobs, entropy, peak, log_total = _forward(hidden, kernel, targets, temperature, chunk)
    return (logprobs, entropy), (hidden, kernel, targets, temperature, entropy, peak, log_total)


def _projected_backward(chunk, residuals, cotangents):
    hidden, kernel, *rest = residuals
    cast_kernel = kernel.astype(hidden.dtype)
    parts = [_split(array, chunk) for array in (hidden, *rest, *cotangents)]

    def one(d_kernel, part):
        d_hidden, d_kernel_part = _chunk_backward(cast_kernel, *part)
        return d_kernel + d_kernel_part, d_hidden

    d_kernel, d_hidden = jax.lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), parts)
    # None stands for a zero cotangent, of the integer targets too.
    return _join(d_hidden, hidden.shape[0]), d_kernel.astype(kernel.dtype), None, None


def _chunk_backward(kernel, hidden, targets, temperature, entropy, peak, log_total, d_logprobs, d_entropy):
    """Cotangents of one chunk.

    With p = softmax(z): d logprob / d z = onehot - p, and d entropy / d z = -p (log p + entropy).
    """
    log_p = (_project(hidden, kernel) - peak[:, None]) / temperature[:, None] - log_total[:, None]
    d_logits = -jnp.exp(log_p) * (d_logprobs[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    d_logits = d_logits.at[jnp.arange(targets.shape[0]), targets].add(d_logprobs)
    d_logits = (d_logits / temperature[:, None]).astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, kernel.T, precision=matmul_precision(hidden.dtype))
    return d_hidden, _project(hidden.T, d_logits)


_projected.defvjp(_projected_forward, _projected_backward)
