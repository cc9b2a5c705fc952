"""The bodies of the attention kernels: what one instance computes of its blocks. See ``triton.py`` for the calls.

Scores are in units of log 2, and ``bounds_ref`` holds the four numbers of ``mask.py``'s blocks that are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrft.models.attention.dense import MASKED_SCORE


def product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Sum over one axis of each of two blocks, in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def scores_of(a: Any, b: Any) -> Any:
    """Of a block of queries and one of keys, or the other way round."""
    return product(a, b, (1, 1)) * (a.shape[1] ** -0.5 * math.log2(math.e))


def where_seen(scores: Any, first: Any, last: Any, key_place: Any, key_axis: int = 1) -> Any:
    """The scores of a block of queries and one of keys, without those that are not seen.

    Args:
        first, last: of the queries, along the other axis.
        key_place: of the first key.
    """
    places = key_place + jax.lax.broadcasted_iota(jnp.int32, scores.shape, key_axis)
    first, last = (jnp.expand_dims(a, key_axis) for a in (first, last))
    return jnp.where((places >= first) & (places <= last), scores, MASKED_SCORE)


def over_blocks(bounds_ref: Any, add: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
    """Adds the blocks that are seen: those that are seen whole without a mask, then those at either end.

    A mask takes several instructions a score, as many as all else that is done to it.
    """
    low, whole, rest, high = (bounds_ref[i] for i in range(4))
    carry = jax.lax.fori_loop(whole, rest, lambda number, carry: add(False, number, carry), carry)
    skipped = rest - whole

    def add_end(number: Any, carry: Any) -> Any:
        return add(True, jnp.where(number < whole, number, number + skipped), carry)

    return jax.lax.fori_loop(low, high - skipped, add_end, carry)


def forward_kernel(q_ref, k_ref, v_ref, first_ref, last_ref, bounds_ref, out_ref, norm_ref, *, step):
    """Result of a block of queries, and the logs (base 2) of the softmax's denominators."""
    q, first, last = q_ref[...], first_ref[...], last_ref[...]

    def add(masked: bool, number: Any, carry: Any) -> Any:
        peak, norm, total = carry
        place = number * step
        k, v = k_ref[pl.ds(place, step), :], v_ref[pl.ds(place, step), :]
        scores = scores_of(q, k)
        if masked:
            scores = where_seen(scores, first, last, place)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        total = total * shrink[:, None] + product(weights.astype(v.dtype), v, (1, 0))
        return new_peak, norm * shrink + jnp.sum(weights, axis=1), total

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    peak, norm, total = over_blocks(bounds_ref, add, (zeros + MASKED_SCORE, zeros, jnp.zeros(q.shape, jnp.float32)))
    out_ref[...] = (total / norm[:, None]).astype(out_ref.dtype)
    norm_ref[...] = peak + jnp.log2(norm)


def query_gradient_kernel(
    q_ref, k_ref, v_ref, d_out_ref, norm_ref, mean_ref, first_ref, last_ref, bounds_ref, d_q_ref, *, step
):
    """Cotangent of a block of queries."""
    q, d_out, norm, mean = q_ref[...], d_out_ref[...], norm_ref[...], mean_ref[...]
    first, last = first_ref[...], last_ref[...]

    def add(masked: bool, number: Any, total: Any) -> Any:
        place = number * step
        k, v = k_ref[pl.ds(place, step), :], v_ref[pl.ds(place, step), :]
        scores, d_weights = scores_of(q, k), product(d_out, v, (1, 1))
        if masked:
            scores = where_seen(scores, first, last, place)
        weights = jnp.exp2(scores - norm[:, None])
        d_scores = weights * (d_weights - mean[:, None])
        return total + product(d_scores.astype(k.dtype), k, (1, 0))

    total = over_blocks(bounds_ref, add, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = (total * q.shape[1] ** -0.5).astype(d_q_ref.dtype)


def key_gradient_kernel(
    q_ref, k_ref, v_ref, d_out_ref, norm_ref, mean_ref, first_ref, last_ref, bounds_ref, d_k_ref, d_v_ref, *, step
):
    """Cotangents of a block of keys and of values, from one query head.

    Scores stand key by query here: so they are the left side of the last products, which a tensor core takes from
    registers as they come from the first ones.
    """
    k, v = k_ref[...], v_ref[...]
    place = pl.program_id(2) * k.shape[0]

    def add(masked: bool, number: Any, carry: Any) -> Any:
        d_k, d_v = carry
        span = pl.ds(number * step, step)
        q, d_out = q_ref[span, :], d_out_ref[span, :]
        scores, d_weights = scores_of(k, q), product(v, d_out, (1, 1))
        if masked:
            scores = where_seen(scores, first_ref[span], last_ref[span], place, key_axis=0)
        weights = jnp.exp2(scores - norm_ref[span][None])
        d_v += product(weights.astype(d_out.dtype), d_out, (1, 0))
        d_scores = weights * (d_weights - mean_ref[span][None])
        return d_k + product(d_scores.astype(q.dtype), q, (1, 0)), d_v

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = over_blocks(bounds_ref, add, (zeros, zeros))
    d_k_ref[...] = (d_k * k.shape[1] ** -0.5).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
