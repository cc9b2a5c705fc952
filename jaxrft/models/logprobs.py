"""Token log-probabilities and entropies, fused with the output projection.

The logits of all tokens together are never held: chunks of tokens are projected, reduced to
a log-probability and an entropy, and dropped. The gradient projects each chunk again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrft import parallel
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
    return _projected(hidden, kernel, targets, temperature, chunk)


def logits_elements(platform: str | None = None) -> int:
    """Logits alive at a time on a device, unless a single time step has more; None: JAX's default platform."""
    return CHUNK_ELEMENTS.get(platform or jax.default_backend(), ACCELERATOR_CHUNK_ELEMENTS)


def _chunk_size(chunk: int | None, hidden: Array, kernel: Array) -> int:
    """Time steps projected at a time, of one device's rows, time steps and columns."""
    batch, time, _ = hidden.shape
    if chunk is None:
        chunk = logits_elements() // (kernel.shape[1] * batch)
    return max(1, min(chunk, time))


def _split(array: Array, chunk: int) -> Array:
    """[batch, time, ...] -> [chunks, batch * chunk, ...]: each chunk holds some time steps of every row, or zeros."""
    batch, time, *rest = array.shape
    array = jnp.pad(array, ((0, 0), (0, -time % chunk), *[(0, 0)] * len(rest)))
    parts = jnp.moveaxis(array.reshape(batch, -1, chunk, *rest), 1, 0)
    return parts.reshape(-1, batch * chunk, *rest)


def _join(parts: Array, batch: int, time: int) -> Array:
    """Undoes :func:`_split`."""
    chunks, size, *rest = parts.shape
    array = jnp.moveaxis(parts.reshape(chunks, batch, size // batch, *rest), 0, 1)
    return array.reshape(batch, chunks * size // batch, *rest)[:, :time]


def _project(hidden, kernel):
    precision = matmul_precision(hidden.dtype)
    return jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=jnp.float32)


class _Shards(NamedTuple):
    """How the arguments lie on a mesh: rows and time steps over some of its axes, the vocabulary over ``tensor``."""

    layout: parallel.Layout
    tokens: PartitionSpec
    kernel: PartitionSpec

    @property
    def vocab_axis(self) -> str | None:
        return "tensor" if "tensor" in parallel.mesh_axes(self.kernel) else None

    @property
    def hidden(self) -> PartitionSpec:
        return PartitionSpec(*self.tokens, None)


def _shards(hidden, kernel) -> _Shards | None:
    layout = parallel.current()
    if layout is None:
        return None
    tokens = layout.activation(("batch", "time"), hidden.shape[:2])
    return _Shards(layout, tokens, layout.gathered(("embed", "vocab"), kernel.shape))


def _columns(kernel, targets, axis):
    """Which of this device's columns is each target's: one-hot, and nowhere where another device has it."""
    first = jax.lax.axis_index(axis) * kernel.shape[1] if axis else 0
    return jnp.arange(kernel.shape[1]) == (targets - first)[:, None]


def _chunk_forward(axis, kernel, hidden, targets, sharpness):
    def total(values):
        return jax.lax.psum(values, axis) if axis else values

    logits = _project(hidden, kernel)
    # The largest logit is taken off before the scaling, which compilers round differently in each of its uses:
    # so the largest is exactly 0 everywhere, and sharp distributions keep their digits.
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    shifted = (logits - peak[:, None]) * sharpness[:, None]
    weights = jnp.exp(shifted)
    norm = total(jnp.sum(weights, axis=-1))
    log_norm = jnp.log(norm)
    entropy = log_norm - total(jnp.sum(weights * shifted, axis=-1)) / norm
    chosen = total(jnp.sum(jnp.where(_columns(kernel, targets, axis), shifted, 0.0), axis=-1))
    return chosen - log_norm, entropy, peak, log_norm


def _forward(axis, chunk, hidden, kernel, targets, temperature):
    """Of one device's rows, time steps and columns."""
    chunk = _chunk_size(chunk, hidden, kernel)
    parts = [_split(array, chunk) for array in (hidden, targets, 1 / temperature)]
    results = jax.lax.map(lambda part: _chunk_forward(axis, kernel, *part), parts)
    return tuple(_join(result, *hidden.shape[:2]) for result in results)


def _run_forward(hidden, kernel, targets, temperature, chunk):
    # Cast once, not in every chunk; and before it is gathered.
    kernel = kernel.astype(hidden.dtype)
    shards = _shards(hidden, kernel)
    if shards is None:
        return _forward(None, chunk, hidden, kernel, targets, temperature)
    run = jax.shard_map(
        functools.partial(_forward, shards.vocab_axis, chunk),
        mesh=shards.layout.mesh,
        in_specs=(shards.hidden, shards.kernel, shards.tokens, shards.tokens),
        out_specs=(shards.tokens,) * 4,
    )
    return run(hidden, kernel, targets, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projected(hidden, kernel, targets, temperature, chunk):
    return _run_forward(hidden, kernel, targets, temperature, chunk)[:2]


def _projected_forward(hidden, kernel, targets, temperature, chunk):
    logprobs, entropy, peak, log_norm = _run_forward(hidden, kernel, targets, temperature, chunk)
    return (logprobs, entropy), (hidden, kernel, targets, temperature, entropy, peak, log_norm)


def _projected_backward(chunk, residuals, cotangents):
    hidden, kernel, *rest = residuals
    kernel, d_logprobs = parallel.apart(kernel, cotangents[0])
    cotangents = (d_logprobs, cotangents[1])
    cast_kernel = kernel.astype(hidden.dtype)
    tokens = (*rest, *cotangents)
    shards = _shards(hidden, kernel)
    if shards is None:
        d_hidden, d_kernel = _backward(None, chunk, hidden, cast_kernel, *tokens)
    else:
        d_hidden, d_kernel = _sharded_backward(shards, chunk, hidden, cast_kernel, tokens)
    # None stands for a zero cotangent, of the integer targets too.
    return d_hidden, d_kernel.astype(kernel.dtype), None, None


def _sharded_backward(shards, chunk, hidden, kernel, tokens):
    summed = parallel.mesh_axes(shards.tokens)
    gradient = shards.layout.parameter("gradients", ("embed", "vocab"), kernel.shape)
    own = set(parallel.mesh_axes(gradient)) - set(parallel.mesh_axes(shards.kernel))
    reduced = gradient if own <= set(summed) else shards.kernel

    def local(hidden, kernel, *tokens):
        d_hidden, d_kernel = _backward(shards.vocab_axis, chunk, hidden, kernel, *tokens)
        return d_hidden, parallel.sum_over(d_kernel, reduced, summed)

    d_hidden, d_kernel = jax.shard_map(
        local,
        mesh=shards.layout.mesh,
        in_specs=(shards.hidden, shards.kernel, *(shards.tokens,) * len(tokens)),
        out_specs=(shards.hidden, reduced),
    )(hidden, kernel, *tokens)
    return d_hidden, parallel.constrain_gradient(d_kernel, ("embed", "vocab"))


def _backward(axis, chunk, hidden, kernel, *tokens):
    """Of one device's rows, time steps and columns; the kernel's gradient is of this device's tokens alone."""
    targets, temperature, *rest = tokens
    chunk = _chunk_size(chunk, hidden, kernel)
    parts = [_split(array, chunk) for array in (hidden, targets, 1 / temperature, *rest)]

    def one(d_kernel, part):
        d_hidden, d_kernel_part = _chunk_backward(axis, kernel, *part)
        return d_kernel + d_kernel_part, d_hidden

    # Of the kind that the sum has: inside shard_map, different on devices with other tokens or columns.
    varying = tuple(jax.typeof(hidden).mat.varying | jax.typeof(kernel).mat.varying)
    start = jax.lax.pcast(jnp.zeros(kernel.shape, jnp.float32), varying, to="varying")
    d_kernel, d_hidden = jax.lax.scan(one, start, parts)
    return _join(d_hidden, *hidden.shape[:2]), d_kernel


def _chunk_backward(axis, kernel, hidden, targets, sharpness, entropy, peak, log_norm, d_logprobs, d_entropy):
    """Cotangents of one chunk.

    With p = softmax(z): d logprob / d z = onehot - p, and d entropy / d z = -p (log p + entropy).
    """
    log_p = (_project(hidden, kernel) - peak[:, None]) * sharpness[:, None] - log_norm[:, None]
    d_logits = -jnp.exp(log_p) * (d_logprobs[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    d_logits += jnp.where(_columns(kernel, targets, axis), d_logprobs[:, None], 0.0)
    d_logits = (d_logits * sharpness[:, None]).astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, kernel.T, precision=matmul_precision(hidden.dtype))
    return jax.lax.psum(d_hidden, axis) if axis else d_hidden, _project(hidden.T, d_logits)


_projected.defvjp(_projected_forward, _projected_backward)
