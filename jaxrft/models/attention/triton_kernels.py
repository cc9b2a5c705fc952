"""The bodies of the attention kernels: what one instance computes of its blocks. See ``triton.py`` for the calls."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrft.models.attention.dense import MASKED_SCORE


def product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Sum over one axis of each of two blocks, in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def masked_scores(q: Any, k: Any, first: Any, last: Any, key_place: Any) -> Any:
    """Scores in units of log 2, of a block of queries and one of keys; ``key_place``: of the first key."""
    scores = product(q, k, (1, 1)) * (q.shape[-1] ** -0.5 * math.log2(math.e))
    places = key_place + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where((places >= first[:, None]) & (places <= last[:, None]), scores, MASKED_SCORE)


def forward_kernel(q_ref, k_ref, v_ref, first_ref, last_ref, low_ref, high_ref, out_ref, norm_ref, *, key_block):
    """Result of a block of queries, and the logs (base 2) of the softmax's denominators."""
    q, first, last = q_ref[...], first_ref[...], last_ref[...]
    block = pl.program_id(0)

    def add(number: Any, carry: Any) -> Any:
        peak, norm, total = carry
        place = number * key_block
        k, v = k_ref[pl.ds(place, key_block), :], v_ref[pl.ds(place, key_block), :]
        scores = masked_scores(q, k, first, last, place)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        total = total * shrink[:, None] + product(weights.astype(v.dtype), v, (1, 0))
        return new_peak, norm * shrink + jnp.sum(weights, axis=1), total

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    start = (zeros + MASKED_SCORE, zeros, jnp.zeros(q.shape, jnp.float32))
    peak, norm, total = jax.lax.fori_loop(low_ref[block], high_ref[block], add, start)
    out_ref[...] = (total / norm[:, None]).astype(out_ref.dtype)
    norm_ref[...] = peak + jnp.log2(norm)


def query_gradient_kernel(
    q_ref, k_ref, v_ref, d_out_ref, norm_ref, mean_ref, first_ref, last_ref, low_ref, high_ref, d_q_ref, *, key_block
):
    """Cotangent of a block of queries."""
    q, d_out, norm, mean = q_ref[...], d_out_ref[...], norm_ref[...], mean_ref[...]
    first, last = first_ref[...], last_ref[...]
    block = pl.program_id(0)

    def add(number: Any, total: Any) -> Any:
        place = number * key_block
        k, v = k_ref[pl.ds(place, key_block), :], v_ref[pl.ds(place, key_block), :]
        weights = jnp.exp2(masked_scores(q, k, first, last, place) - norm[:, None])
        d_scores = weights * (product(d_out, v, (1, 1)) - mean[:, None])
        return total + product(d_scores.astype(k.dtype), k, (1, 0))

    total = jax.lax.fori_loop(low_ref[block], high_ref[block], add, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = (total * q.shape[-1] ** -0.5).astype(d_q_ref.dtype)


def key_gradient_kernel(
    q_ref, k_ref, v_ref, d_out_ref, norm_ref, mean_ref, first_ref, last_ref, low_ref, high_ref, d_k_ref, d_v_ref,
    *, query_block, group,
):  # fmt: skip
    """Cotangents of a block of keys and of values, from all query heads that share them."""
    k, v = k_ref[...], v_ref[...]
    block = pl.program_id(0)
    low, high = low_ref[block], high_ref[block]

    def of_head(head: Any, carry: Any) -> Any:
        def add(number: Any, carry: Any) -> Any:
            d_k, d_v = carry
            span = pl.ds(number * query_block, query_block)
            q, d_out = q_ref[span, head, :], d_out_ref[span, head, :]
            scores = masked_scores(q, k, first_ref[span], last_ref[span], block * k.shape[0])
            weights = jnp.exp2(scores - norm_ref[head, span][:, None])
            d_v += product(weights.astype(d_out.dtype), d_out, (0, 0))
            d_scores = weights * (product(d_out, v, (1, 1)) - mean_ref[head, span][:, None])
            return d_k + product(d_scores.astype(q.dtype), q, (0, 0)), d_v

        return jax.lax.fori_loop(low, high, add, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    d_k_ref[...] = (d_k * k.shape[-1] ** -0.5).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
