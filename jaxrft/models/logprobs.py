"""Token log-probabilities and entropies, fused with the output projection.

The logits of the whole vocabulary are never held: all tokens are projected to a few columns of it at a time, reduced
to what a log-probability and an entropy need of these columns, and dropped. The gradient projects each chunk again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrft import parallel
from jaxrft.models.logit_chunks import Reduction, differentiate_logits, reduce_logits


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
    logprobs, entropy = model_logprobs(model, hidden[:, :-1], tokens[:, 1:], temperature)
    return jnp.where(valid, logprobs, 0.0), jnp.where(valid, entropy, 0.0)


def model_logprobs(
    model: Any,
    hidden: Float[Array, "batch time hidden"],
    targets: Int[Array, "batch time"],
    temperature: Float[Array, "batch time"],
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """:func:`projected_logprobs` with a model's output projection as it is kept: a tied one is not turned around."""
    spec = getattr(model, "spec", None)
    if getattr(spec, "tie_embeddings", False):
        return projected_logprobs(hidden, model.embed.embedding[...], targets, temperature, transposed=True)
    return projected_logprobs(hidden, model.output_kernel, targets, temperature)


def projected_logprobs(
    hidden: Float[Array, "*batch time hidden"],
    kernel: Float[Array, "hidden vocab"] | Float[Array, "vocab hidden"],
    targets: Int[Array, "*batch time"],
    temperature: Float[Array, "*batch time"],
    chunk: int | None = None,
    *,
    transposed: bool = False,
) -> tuple[Float[Array, "*batch time"], Float[Array, "*batch time"]]:
    """Log-probability of ``targets`` and entropy of ``softmax(hidden @ kernel / temperature)``, float32.

    Differentiable (in reverse mode) with respect to ``hidden`` and ``kernel``, through both results;
    the temperature counts as a constant.

    Args:
        hidden: in its type the projection is computed, with float32 sums. With or without a batch axis; both axes
            may be sharded.
        chunk: columns of the vocabulary at a time; None takes 2**20 logits on a CPU, 512 MiB of them elsewhere.
        transposed: the kernel is [vocab, hidden].
    """
    if hidden.ndim == 2:
        rows = (array[None] for array in (targets, temperature))
        logprobs, entropy = _projected(hidden[None], kernel, *rows, Reduction(transposed, None, chunk))
        return logprobs[0], entropy[0]
    return _projected(hidden, kernel, targets, temperature, Reduction(transposed, None, chunk))


class _Shards(NamedTuple):
    """How the arguments lie on a mesh: rows and time steps over some of its axes, the vocabulary over ``tensor``."""

    layout: parallel.Layout
    axes: tuple[str, str]
    tokens: PartitionSpec
    kernel: PartitionSpec

    def on_a_device(self, how: Reduction) -> Reduction:
        """``how``, of one device's columns."""
        return how._replace(axis="tensor" if "tensor" in parallel.mesh_axes(self.kernel) else None)

    @property
    def hidden(self) -> PartitionSpec:
        return PartitionSpec(*self.tokens, None)


def _shards(hidden, kernel, how) -> _Shards | None:
    layout = parallel.current()
    if layout is None:
        return None
    tokens = layout.activation(("batch", "time"), hidden.shape[:2])
    axes = ("vocab", "embed") if how.transposed else ("embed", "vocab")
    return _Shards(layout, axes, tokens, layout.gathered(axes, kernel.shape))


def _forward(how, hidden, kernel, targets, temperature):
    """Of one device's rows, time steps and columns."""
    tokens = (array.reshape(-1) for array in (targets, 1 / temperature))
    results = reduce_logits(how, hidden.reshape(-1, hidden.shape[-1]), kernel, *tokens)
    return tuple(result.reshape(targets.shape) for result in results)


def _run_forward(hidden, kernel, targets, temperature, how):
    # Cast once, not in every chunk.
    kernel = kernel.astype(hidden.dtype)
    shards = _shards(hidden, kernel, how)
    if shards is None:
        return _forward(how, hidden, kernel, targets, temperature)
    run = jax.shard_map(
        functools.partial(_forward, shards.on_a_device(how)),
        mesh=shards.layout.mesh,
        in_specs=(shards.hidden, shards.kernel, shards.tokens, shards.tokens),
        out_specs=(shards.tokens,) * 4,
    )
    return run(hidden, parallel.as_cast(kernel), targets, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projected(hidden, kernel, targets, temperature, how):
    return _run_forward(hidden, kernel, targets, temperature, how)[:2]


def _projected_forward(hidden, kernel, targets, temperature, how):
    logprobs, entropy, peak, log_norm = _run_forward(hidden, kernel, targets, temperature, how)
    return (logprobs, entropy), (hidden, kernel, targets, temperature, entropy, peak, log_norm)


def _projected_backward(how, residuals, cotangents):
    hidden, kernel, *rest = residuals
    kernel, d_logprobs = parallel.apart(kernel, cotangents[0])
    cast_kernel = kernel.astype(hidden.dtype)
    tokens = (*rest, d_logprobs, cotangents[1])
    shards = _shards(hidden, kernel, how)
    if shards is None:
        d_hidden, d_kernel = _backward(how, hidden, cast_kernel, *tokens)
    else:
        d_hidden, d_kernel = _sharded_backward(shards, how, hidden, cast_kernel, tokens)
    # None stands for a zero cotangent, of the integer targets too.
    return d_hidden, d_kernel.astype(kernel.dtype), None, None


def _sharded_backward(shards, how, hidden, kernel, tokens):
    how, summed = shards.on_a_device(how), parallel.mesh_axes(shards.tokens)
    gradient = shards.layout.parameter("gradients", shards.axes, kernel.shape)
    own = set(parallel.mesh_axes(gradient)) - set(parallel.mesh_axes(shards.kernel))
    reduced = gradient if own <= set(summed) else shards.kernel

    def local(hidden, kernel, *tokens):
        d_hidden, d_kernel = _backward(how, hidden, kernel, *tokens)
        d_hidden = jax.lax.psum(d_hidden, how.axis) if how.axis else d_hidden
        return d_hidden, parallel.sum_over(d_kernel, reduced, summed)

    d_hidden, d_kernel = jax.shard_map(
        local,
        mesh=shards.layout.mesh,
        in_specs=(shards.hidden, shards.kernel, *(shards.tokens,) * len(tokens)),
        out_specs=(shards.hidden, reduced),
    )(hidden, parallel.as_cast(kernel), *tokens)
    return d_hidden, parallel.constrain_gradient(d_kernel, shards.axes)


def _backward(how, hidden, kernel, targets, temperature, *rest):
    """Of one device's rows, time steps and columns; of neither gradient other devices' parts are added."""
    tokens = (array.reshape(-1) for array in (targets, 1 / temperature, *rest))
    d_hidden, d_kernel = differentiate_logits(how, hidden.reshape(-1, hidden.shape[-1]), kernel, *tokens)
    return d_hidden.astype(hidden.dtype).reshape(hidden.shape), d_kernel


_projected.defvjp(_projected_forward, _projected_backward)
