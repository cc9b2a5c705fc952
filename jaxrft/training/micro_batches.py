"""One function over all micro-batches of a batch, inside a jitted program.

Packed batches are padded with empty micro-batches, so that few programs are compiled; these are not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft import algorithms as alg
from jaxrft.training.batch import TrainBatch
from jaxrft.training.state import Placement

Stats = dict[str, Float[Array, ""]]


def accumulate(
    loss: Callable[..., Any], params: Any, batch: tuple[TrainBatch, Any], placement: Placement
) -> tuple[Any, Stats]:
    """Gradients and statistics of all micro-batches: sums, since each part is weighted by the whole's counts.

    Gradients are summed in float32, and lie where the strategy has them.

    Args:
        loss: of parameters and one micro-batch with what belongs to it; returns (loss, statistics).
        params: to differentiate with respect to.
        batch: micro-batches, and a tree with as many leading entries.
    """

    def one(part: Any) -> tuple[Any, Stats]:
        (_, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, part)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        return placement.lay("gradients", gradients), stats

    used, parts = batch[0].used, (dataclasses.replace(batch[0], used=None), batch[1])
    if parts[0].tokens.shape[0] == 1:
        return one(_part(parts, 0))
    zeros = placement.lay("gradients", jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def add(total: Any, part: Any) -> tuple[Any, Stats]:
        gradients, stats = one(part)
        return jax.tree.map(jnp.add, total, gradients), stats

    if used is None:
        gradients, stats = jax.lax.scan(add, zeros, parts)
        return gradients, alg.merge_stats(stats)

    def add_used(number: Any, totals: tuple[Any, Stats]) -> tuple[Any, Stats]:
        gradients, stats = add(totals[0], _part(parts, number))
        return gradients, alg.merge_stats({k: jnp.stack([totals[1][k], v]) for k, v in stats.items()})

    shapes = jax.eval_shape(one, _part(parts, 0))[1]
    nothing = {"max": -jnp.inf, "min": jnp.inf}
    stats = {name: jnp.full(s.shape, nothing.get(name[-3:], 0.0), s.dtype) for name, s in shapes.items()}
    return _over_used(used, parts[0].tokens.shape[0], add_used, (zeros, stats))


def map_parts(function: Callable[[TrainBatch], Any], batch: TrainBatch) -> Any:
    """``function`` of each micro-batch, stacked; zeros for those that hold nothing."""
    used, parts = batch.used, dataclasses.replace(batch, used=None)
    if used is None:
        return jax.lax.map(function, parts)
    count = parts.tokens.shape[0]

    def write(number: Any, arrays: Any) -> Any:
        return jax.tree.map(lambda a, value: a.at[number].set(value), arrays, function(_part(parts, number)))

    shapes = jax.eval_shape(function, _part(parts, 0))
    zeros = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)
    return _over_used(used, count, write, zeros)


def _part(parts: Any, number: Any) -> Any:
    return jax.tree.map(lambda a: a[number], parts)


def _over_used(used: Any, parts: int, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """``body(number, carry)`` for the number of each micro-batch that holds anything, and for no other."""
    each = parts // used.shape[0]

    def one_step(step: Any, carry: Any) -> Any:
        return jax.lax.fori_loop(step * each, step * each + used[step], body, carry)

    return jax.lax.fori_loop(0, used.shape[0], one_step, start)
