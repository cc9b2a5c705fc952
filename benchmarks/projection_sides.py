"""What benchmarks/projection.py times: our log-probabilities, the products that they need, and the plain formula.

Each side is a function of (hidden, kernel, targets, temperature, cotangents, stand-in); the kernel is [vocab, hidden]
where it is tied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrft.models.logit_chunks import Reduction, chunk_size
from jaxrft.models.logprobs import projected_logprobs
from jaxrft.models.precision import matmul_precision


def inputs(tokens: int, hidden: int, vocab: int, dtype: str, param_dtype: str, tied: bool) -> tuple[jax.Array, ...]:
    """Random: hidden states, kernel, targets, temperature, cotangents of log-probability and entropy, and what the bare
    products have as a chunk's cotangents: a GPU multiplies numbers that are alike faster."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (vocab, hidden) if tied else (hidden, vocab)
    kernel = jax.jit(lambda key: (jax.random.normal(key, shape) * hidden**-0.5).astype(param_dtype))(keys[1])
    return (
        jax.random.normal(keys[0], (tokens, hidden), dtype),
        kernel,
        jax.random.randint(keys[2], (tokens,), 0, vocab),
        jax.random.uniform(keys[3], (tokens,), minval=0.7, maxval=1.2),
        jax.random.normal(keys[4], (2, tokens)),
        jax.random.normal(keys[5], (tokens, chunk_size(tokens, vocab)), dtype),
    )


def functions(tied: bool, backward: bool) -> dict[str, Callable[..., Any]]:
    """The sides by name; with the gradients of hidden states and kernel, or without."""
    ours = functools.partial(_with_gradient if backward else _values, functools.partial(_ours, tied))
    naive = functools.partial(_with_gradient if backward else _values, functools.partial(_naive, tied))
    chunked = functools.partial(_products, Reduction(transposed=tied), backward)
    whole = functools.partial(_whole_products, tied, backward)
    return {"jaxrft": ours, "matmuls": chunked, "whole matmuls": whole, "naive": naive}


def _ours(tied, hidden, kernel, targets, temperature):
    return projected_logprobs(hidden, kernel, targets, temperature, transposed=tied)


def _naive(tied, hidden, kernel, targets, temperature):
    """All logits at once."""
    logits = _product(hidden, kernel.astype(hidden.dtype), 1, int(tied)) / temperature[:, None]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _values(function, hidden, kernel, targets, temperature, cotangents, stand_in):
    return function(hidden, kernel, targets, temperature)


def _with_gradient(function, hidden, kernel, targets, temperature, cotangents, stand_in):
    values, vjp = jax.vjp(lambda hidden, kernel: function(hidden, kernel, targets, temperature), hidden, kernel)
    return values, vjp(tuple(cotangents))


def _product(x, y, x_axis, y_axis):
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _products(how: Reduction, backward: bool, hidden, kernel, targets, temperature, cotangents, stand_in):
    """The products alone, chunk by chunk as ours: logits; with gradients, logits again and two more.

    Gradients are float32: that of hidden states is summed over the chunks, that of the kernel is put together.
    The stand-in is every chunk's cotangent.
    """
    kernel, axis = kernel.astype(hidden.dtype), int(not how.transposed)
    size, starts, last = how.starts(kernel, len(hidden))

    def logits(start, size):
        columns = how.columns(kernel, start, size)
        # Behind the barrier the compiler does not see that most of it is not looked at.
        return columns, jax.lax.optimization_barrier(_product(hidden, columns, 1, int(how.transposed)))[:, 0]

    def differentiate(gradients, start, size=size):
        d_hidden, d_kernel = gradients
        columns, seen = logits(start, size)
        # Nor that it is the same in every chunk.
        cotangent, start = jax.lax.optimization_barrier((stand_in[:, :size], start))
        d_hidden += _product(cotangent, columns, 1, axis)
        d_columns = _product(cotangent, hidden, 0, 0) if how.transposed else _product(hidden, cotangent, 0, 0)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_kernel, d_columns, start, axis)), seen

    results = [jax.lax.map(lambda start: logits(start, size)[1], starts), logits(last, how.vocab(kernel) - last)[1]]
    if backward:
        zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
        gradients, seen = jax.lax.scan(differentiate, zeros, starts)
        results += [seen, differentiate(gradients, last, how.vocab(kernel) - last)]
    return results


def _whole_products(tied: bool, backward: bool, hidden, kernel, targets, temperature, cotangents, stand_in):
    """The products alone, each at once."""
    kernel = kernel.astype(hidden.dtype)
    results = [jax.lax.optimization_barrier(_product(hidden, kernel, 1, int(tied)))[:, 0]]
    if backward:
        again, _ = jax.lax.optimization_barrier((hidden, results[0]))
        logits = jax.lax.optimization_barrier(_product(again, kernel, 1, int(tied)).astype(hidden.dtype))
        d_kernel = _product(logits, hidden, 0, 0) if tied else _product(hidden, logits, 0, 0)
        results += [logits[:, 0], _product(logits, kernel, 1, int(not tied)), d_kernel]
    return results
