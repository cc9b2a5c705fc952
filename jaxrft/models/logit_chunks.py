"""Reductions of logits on one device, a chunk of the vocabulary at a time, and their gradient.

Where one kernel multiplies and reduces (``logit_choice.py``), there are no chunks of logits, only of their cotangents.
Chunks are of the vocabulary, not of the tokens, for the sake of the gradient: a column of the kernel's gradient is
then written once, and what is summed over the chunks is the tokens' gradient, [tokens, hidden]. Chunks of tokens
would read and write the kernel's, [hidden, vocab] in float32, once for each of them: hundreds of megabytes for some
hundred tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrft.models.logit_choice import Way, choose_way
from jaxrft.models.precision import matmul_precision

# Logits alive at a time, in elements. Between the products they are passed over a few times: on a CPU in its caches,
# if chunks are small. On an accelerator a product writes logits to memory whatever the chunk: few large ones are best.
CHUNK_ELEMENTS = {"cpu": 2**20}
ACCELERATOR_CHUNK_ELEMENTS = 2**27
# Each chunk reads the hidden states, and in the gradient reads and writes their float32 cotangent. Of fewer columns
# that shows beside the products.
SMALLEST_CHUNK = 1024
# Chunks begin where the tiles of a product begin, which are so wide.
ALIGNMENT = 128


class Reduction(NamedTuple):
    """How a device's logits are reduced.

    Attributes:
        transposed: the kernel is [vocab, hidden], as embeddings are kept.
        axis: of the mesh, over which the vocabulary lies, inside ``shard_map``; None: it is whole.
        chunk: columns of the vocabulary at a time; None: as many as :func:`logits_elements` allows.
        way: by which kernels; None: by those that ``logit_choice.py`` chooses.
    """

    transposed: bool = False
    axis: str | None = None
    chunk: int | None = None
    way: Way | None = None

    def chosen_way(self, hidden: Array, kernel: Array) -> Way:
        """The way for these hidden states and this kernel."""
        return self.way or choose_way(hidden.dtype, hidden.shape[1], self.vocab(kernel), self.transposed)

    def vocab(self, kernel: Array) -> int:
        """The kernel's columns: those of this device."""
        return kernel.shape[not self.transposed]

    def columns(self, kernel: Array, start, size: int) -> Array:
        """Some of the kernel's columns, as they lie in it."""
        return jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=int(not self.transposed))

    def places(self, kernel: Array, targets: Array) -> Array:
        """Columns of the targets, counted from this device's first."""
        return targets - jax.lax.axis_index(self.axis) * self.vocab(kernel) if self.axis else targets

    def starts(self, kernel: Array, tokens: int) -> tuple[int, Array, int]:
        """Size of the chunks; where those begin that another one follows; where the last does, which may be smaller."""
        size = chunk_size(tokens, self.vocab(kernel)) if self.chunk is None else self.chunk
        size = max(1, min(size, self.vocab(kernel)))
        last = (self.vocab(kernel) - 1) // size * size
        return size, jnp.arange(0, last, size), last


def logits_elements(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Logits alive at a time on a device.

    Args:
        tokens, vocab: of the device.
        platform: None: JAX's default.
    """
    return tokens * chunk_size(tokens, vocab, platform)


def chunk_size(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Columns of the vocabulary at a time; all chunks are nearly equal."""
    elements = CHUNK_ELEMENTS.get(platform or jax.default_backend(), ACCELERATOR_CHUNK_ELEMENTS)
    chunks = -(-vocab // max(elements // tokens, SMALLEST_CHUNK))
    return min(-(-vocab // chunks // ALIGNMENT) * ALIGNMENT, vocab)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Sums over an axis of each, in float32. Neither is turned around: a whole kernel would be copied for it."""
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits(how: Reduction, hidden, columns):
    return _product(hidden, columns, 1, int(how.transposed))


def reduce_logits(
    how: Reduction,
    hidden: Float[Array, "tokens hidden"],
    kernel: Float[Array, "..."],
    targets: Int[Array, "tokens"],
    sharpness: Float[Array, "tokens"],
) -> tuple[Float[Array, "tokens"], ...]:
    """Log-probability, entropy, largest logit, and log of the norm of ``exp((logits - largest) * sharpness)``.

    Args:
        hidden, targets: of this device's tokens.
        kernel: of this device's columns; [hidden, vocab] or [vocab, hidden].
        sharpness: one over the temperature.
    """
    places, way = how.places(kernel, targets), how.chosen_way(hidden, kernel)
    if way == "product":
        return _combined(how.axis, sharpness, *_reduce_product(how, hidden, kernel, places, sharpness))
    size, starts, last = how.starts(kernel, len(hidden))

    def one(start, size=size):
        logits = _logits(how, hidden, how.columns(kernel, start, size))
        return _reduce_chunk(logits, places - start, sharpness, way)

    parts = [part[None] for part in one(last, how.vocab(kernel) - last)]
    if last:
        parts = [jnp.concatenate(both) for both in zip(jax.lax.map(one, starts), parts)]
    return _combined(how.axis, sharpness, *parts)


def _reduce_product(how, hidden, kernel, places, sharpness):
    """What :func:`_reduce_chunk` gives, of tiles of the product; those words behind them are a chunk of their own."""
    # Pallas is loaded where it is used.
    from jaxrft.models.logit_product import reduce_product

    parts = reduce_product(hidden, kernel, places, sharpness, how.transposed)
    done, vocab = len(parts[0]) * ALIGNMENT, how.vocab(kernel)
    if done == vocab:
        return parts
    logits = _logits(how, hidden, how.columns(kernel, done, vocab - done))
    rest = _reduce_chunk(logits, places - done, sharpness, "plain")
    return [jnp.concatenate([part, more[None]]) for part, more in zip(parts, rest)]


def _reduce_chunk(logits, places, sharpness, way):
    """The largest logit, sums over exp(logits - largest), and the target's logit, or 0 where it is elsewhere."""
    if way == "rows":
        from jaxrft.models.logit_kernel import reduce_rows

        return reduce_rows(logits, places, sharpness)
    # The largest logit is taken off before the scaling, which compilers round differently in each of its uses:
    # so the largest is exactly 0 everywhere, and sharp distributions keep their digits.
    peak = jnp.max(logits, axis=-1)
    shifted = (logits - peak[:, None]) * sharpness[:, None]
    weights = jnp.exp(shifted)
    inside = (places >= 0) & (places < logits.shape[1])
    # Read at one place: to compare every column with it would be one more pass.
    chosen = jnp.take_along_axis(logits, jnp.where(inside, places, 0)[:, None], axis=-1)[:, 0]
    return peak, jnp.sum(weights, -1), jnp.sum(weights * shifted, -1), jnp.where(inside, chosen, 0.0)


def _combined(axis, sharpness, peaks, norms, moments, chosen):
    """What :func:`reduce_logits` returns, from the reductions of the chunks, [chunks, tokens]."""

    def total(values):
        return jax.lax.psum(jnp.sum(values, axis=0), axis) if axis else jnp.sum(values, axis=0)

    peak = jnp.max(peaks, axis=0)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    # What is added to a chunk's shifted logits when they are shifted by the largest of all instead of its own.
    shift = (peaks - peak) * sharpness
    scale = jnp.exp(shift)
    norm = total(scale * norms)
    log_norm = jnp.log(norm)
    entropy = log_norm - total(scale * (moments + shift * norms)) / norm
    return (total(chosen) - peak) * sharpness - log_norm, entropy, peak, log_norm


def differentiate_logits(
    how: Reduction,
    hidden: Float[Array, "tokens hidden"],
    kernel: Float[Array, "..."],
    targets: Int[Array, "tokens"],
    *rest: Float[Array, "tokens"],
) -> tuple[Float[Array, "tokens hidden"], Float[Array, "..."]]:
    """Cotangents of ``hidden`` and of ``kernel``, which are float32 sums, of this device's tokens and columns alone.

    Args:
        rest: sharpness, entropy, largest logit, log of the norm, and the cotangents of log-probability and entropy.
    """
    places, way = how.places(kernel, targets), how.chosen_way(hidden, kernel)
    size, starts, last = how.starts(kernel, len(hidden))

    def one(gradients, start, size=size):
        d_hidden, d_kernel = gradients
        columns = how.columns(kernel, start, size)
        d_logits = _d_logits(how, way, hidden, columns, places - start, rest)
        d_hidden += _product(d_logits, columns, 1, int(not how.transposed))
        d_columns = _product(d_logits, hidden, 0, 0) if how.transposed else _product(hidden, d_logits, 0, 0)
        axis = int(not how.transposed)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_kernel, d_columns, start, axis)), None

    # Of the kind that the sums have: inside shard_map, different on devices with other tokens or columns.
    varying = tuple(jax.typeof(hidden).mat.varying | jax.typeof(kernel).mat.varying)
    zeros = [jnp.zeros(array.shape, jnp.float32) for array in (hidden, kernel)]
    gradients = tuple(jax.lax.pcast(array, varying, to="varying") for array in zeros)
    gradients, _ = jax.lax.scan(one, gradients, starts)
    return one(gradients, last, how.vocab(kernel) - last)[0]


def _d_logits(how, way, hidden, columns, places, rest):
    """Cotangents of a chunk's logits, in the type of the hidden states."""
    if way == "product":
        from jaxrft.models.logit_product import cotangents_of, differentiate_product

        return differentiate_product(hidden, columns, places, cotangents_of(*rest), how.transposed)
    return _cotangents(_logits(how, hidden, columns), places, *rest).astype(hidden.dtype)


def _cotangents(logits, places, sharpness, entropy, peak, log_norm, d_logprobs, d_entropy):
    """Cotangents of a chunk's logits before the scaling.

    With p = softmax(z): d logprob / d z = onehot - p, and d entropy / d z = -p (log p + entropy).
    """
    log_p = (logits - peak[:, None]) * sharpness[:, None] - log_norm[:, None]
    d_logits = -jnp.exp(log_p) * (d_logprobs[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    # Inside the one pass that makes the cotangents: added later, it would be added to what is rounded already.
    d_logits += jnp.where(jnp.arange(logits.shape[1]) == places[:, None], d_logprobs[:, None], 0.0)
    return d_logits * sharpness[:, None]
