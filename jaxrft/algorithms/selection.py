"""Which tokens an objective keeps or picks out, where that depends on the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrft.algorithms.axes import AxisName, all_rows, own_rows
from jaxrft.algorithms.divergence import clamp_log_ratio
from jaxrft.algorithms.surrogates import clipped_sides

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective

Tokens = Float[Array, "batch time"]
EntropyScope = Literal["batch", "sequence"]

# 0.2 of 5 tokens are one, not the two that float32 would round up to.
_ROUNDING = 1.0 - 1e-6


class Selection(NamedTuple):
    """1 for tokens that are selected, else 0; None where the objective does not ask.

    Attributes:
        kept: tokens of high entropy; the loss of all others is 0.
        chosen: tokens picked out by their covariance.
    """

    kept: Tokens | None
    chosen: Tokens | None


def token_selection(
    objective: PolicyObjective,
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens | Float[Array, "batch"],
    mask: Tokens,
    *,
    entropies: Tokens | None = None,
    key: PRNGKeyArray | None = None,
    axis_name: AxisName | None = None,
) -> Selection:
    """The tokens that an objective selects from a whole batch.

    :func:`~jaxrft.algorithms.policy_loss` calls this itself. Where a batch is split into micro-batches, call it on the
    whole batch and hand each of them its rows as ``selection``: ranks and means are those of the batch.

    Args:
        objective: with ``entropy_share`` the share of the tokens of highest entropy is kept (arXiv:2506.01939), of the
            batch or of each sequence; ``clip_cov`` and ``kl_cov`` choose by covariance (arXiv:2505.22617).
        logprobs, old_logprobs, advantages, mask: as for the loss. No gradient flows.
        entropies: of each token; needed with ``entropy_share``.
        key: for the random choice of ``clip_cov``; row i of the whole batch draws from ``fold_in(key, i)``.
        axis_name: of the devices that the rows are spread over.

    Raises:
        ValueError: something that the objective needs is missing.
    """
    kept = chosen = None
    if objective.entropy_share is not None:
        if entropies is None:
            raise ValueError("entropies: needed with entropy_share")
        kept = _high_entropy(objective, jax.lax.stop_gradient(entropies), mask > 0, axis_name)
    if objective.objective in ("clip_cov", "kl_cov"):
        if objective.objective == "clip_cov" and key is None:
            raise ValueError("key: clip_cov chooses tokens at random and needs one")
        if advantages.ndim == 1:
            advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
        arrays = (jnp.where(mask > 0, jax.lax.stop_gradient(a), 0.0) for a in (logprobs, old_logprobs, advantages))
        everything = _Batch(*(all_rows(array, axis_name) for array in (*arrays, mask)))
        chosen = own_rows(_by_covariance(objective, everything, key), mask.shape[0], axis_name)
    return Selection(kept, chosen)


def _high_entropy(
    objective: PolicyObjective, entropies: Tokens, valid: Bool[Array, "batch time"], axis_name: AxisName | None
) -> Tokens:
    assert objective.entropy_share is not None
    if objective.entropy_scope == "sequence":
        counts = _count(objective.entropy_share, jnp.sum(valid, axis=-1))
        return jax.vmap(_highest)(entropies, valid, counts)
    all_entropies, all_valid = (all_rows(array, axis_name) for array in (entropies, valid))
    count = _count(objective.entropy_share, jnp.sum(all_valid))
    kept = _highest(all_entropies.ravel(), all_valid.ravel(), count).reshape(all_valid.shape)
    return own_rows(kept, valid.shape[0], axis_name)


class _Batch(NamedTuple):
    logprobs: Tokens
    old_logprobs: Tokens
    advantages: Tokens
    mask: Tokens


def _by_covariance(objective: PolicyObjective, x: _Batch, key: PRNGKeyArray | None) -> Tokens:
    tokens = jnp.sum(x.mask)
    mean_logprob, mean_advantage = (jnp.sum(a * x.mask) / jnp.maximum(tokens, 1.0) for a in (x.logprobs, x.advantages))
    covariance = (x.advantages - mean_advantage) * (x.logprobs - mean_logprob)
    eligible, scores = x.mask > 0, covariance
    if objective.objective == "clip_cov":
        assert key is not None
        low, high = clipped_sides(objective, jnp.exp(clamp_log_ratio(x.logprobs - x.old_logprobs)), x.advantages)
        inside = (covariance > objective.cov_low) & (covariance < objective.cov_high)
        eligible &= ~low & ~high & inside
        keys = _row_keys(key, x.mask.shape[0])
        scores = jax.vmap(lambda k: jax.random.uniform(k, x.mask.shape[1:]))(keys)
    return _highest(scores.ravel(), eligible.ravel(), _count(objective.cov_share, tokens)).reshape(x.mask.shape)


def _row_keys(key: PRNGKeyArray, rows: int) -> PRNGKeyArray:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _count(share: float, of: Int[Array, "..."] | Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.ceil(share * _ROUNDING * of)


def _highest(scores: Float[Array, "n"], eligible: Bool[Array, "n"], count: Float[Array, ""]) -> Float[Array, "n"]:
    """1 for the ``count`` eligible places of highest score, those that come first where scores are equal."""
    order = jnp.argsort(jnp.where(eligible, -scores, jnp.inf), stable=True)
    place = jnp.zeros(scores.shape, jnp.int32).at[order].set(jnp.arange(scores.size))
    return (eligible & (place < count)).astype(jnp.float32)
