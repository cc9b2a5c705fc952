"""Policy objectives: one typed description, and one function that evaluates it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.choices import require_choice
from jaxrft.algorithms.divergence import KLKind, clamp_log_ratio, kl
from jaxrft.algorithms.levels import LEVELS, Level
from jaxrft.algorithms.reductions import Reduction, Totals, token_weights, totals
from jaxrft.algorithms.surrogates import SURROGATES, SurrogateName, Tokens, TokenStats

Stats = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A policy objective as data; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        objective: ``clip``, the clipped surrogate of PPO (arXiv:1707.06347).
        level: ``token``: every token has its own ratio; ``sequence``: all tokens of a response share the
            exponential of its mean log-ratio (GSPO, arXiv:2507.18071).
        clip_low: ratios are clipped at 1 - clip_low.
        clip_high: and at 1 + clip_high; None: clip_low, as in PPO.
        dual_clip: for negative advantages the loss is at most this many times |advantage|
            (arXiv:1912.09729); None: no bound.
        reduction: see :func:`~jaxrft.algorithms.reductions.token_weights`.
        constant_length: divisor of the reduction ``constant``.
        kl_coef: weight of the KL to the reference; 0 needs no reference.
        kl_kind: its estimator, see :func:`~jaxrft.algorithms.divergence.kl`.

    Raises:
        ValueError: a name that is not known, or a number below the least that its field takes.
    """

    objective: SurrogateName = "clip"
    level: Level = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    reduction: Reduction = "token_mean"
    constant_length: int | None = None
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"

    def __post_init__(self) -> None:
        names: dict[str, Iterable[str]] = {
            "objective": SURROGATES,
            "level": LEVELS,
            "reduction": get_args(Reduction),
            "kl_kind": get_args(KLKind),
        }
        for field, choices in names.items():
            require_choice(field, getattr(self, field), choices)
        least = {"clip_low": 0, "clip_high": 0, "dual_clip": 1, "constant_length": 1, "kl_coef": 0}
        for field, minimum in least.items():
            value = getattr(self, field)
            if value is not None and not value >= minimum:
                raise ValueError(f"{field}: got {value!r}, takes at least {minimum}")


def policy_loss(
    objective: PolicyObjective,
    logprobs: Float[Array, "batch time"],
    old_logprobs: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"] | Float[Array, "batch"],
    mask: Float[Array, "batch time"],
    *,
    ref_logprobs: Float[Array, "batch time"] | None = None,
    whole: Totals | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """The loss to minimise, and what it looked like.

    Where the mask is 0 the arrays may hold anything, infinities and NaN too.

    Args:
        objective: the description.
        logprobs: log-probabilities of the sampled tokens under the policy; gradients flow through these alone.
        old_logprobs: the same before the first update on these samples.
        advantages: of each token, or of each sequence.
        mask: 1 for tokens that count, 0 elsewhere; holes and empty rows are allowed.
        ref_logprobs: under the reference; needed where ``kl_coef`` is above 0.
        whole: counts of the whole batch where these rows are a part of it: the losses and mean
            statistics of all parts then add up to those of the batch.

    Returns:
        The loss, and statistics: means over tokens (over sequences for the ratio and clipping of the level
        ``sequence``), but for those that end in ``max`` or ``min``; :func:`merge_stats` merges those of several parts.

    Raises:
        ValueError: ``kl_coef`` is above 0 and there are no ``ref_logprobs``, or shapes differ.
    """
    mask = mask.astype(jnp.float32)
    whole = totals(mask) if whole is None else whole
    logprobs = _valid("logprobs", logprobs, mask)
    old_logprobs = jax.lax.stop_gradient(_valid("old_logprobs", old_logprobs, mask))
    advantages = jax.lax.stop_gradient(_valid("advantages", advantages, mask))
    log_ratio = clamp_log_ratio(logprobs - old_logprobs)
    ratio = jnp.exp(LEVELS[objective.level](log_ratio, mask))
    losses, level_stats = SURROGATES[objective.objective](objective, ratio, advantages)
    level_stats["ratio/mean"] = ratio
    deviation = jnp.abs(jnp.expm1(log_ratio))
    token_stats = {"ratio/deviation_mean": deviation, "policy_kl": kl(old_logprobs, logprobs)}
    if objective.kl_coef > 0:
        if ref_logprobs is None:
            raise ValueError("ref_logprobs: needed where kl_coef is above 0")
        reference = jax.lax.stop_gradient(_valid("ref_logprobs", ref_logprobs, mask))
        token_stats["kl"] = kl(logprobs, reference, objective.kl_kind)
        losses = losses + objective.kl_coef * token_stats["kl"]
    loss = jnp.sum(losses * token_weights(mask, objective.reduction, whole, objective.constant_length))
    level_reduction: Reduction = "token_mean" if objective.level == "token" else "sequence_mean"
    stats = _means(level_stats, token_weights(mask, level_reduction, whole))
    stats |= _means(token_stats, token_weights(mask, "token_mean", whole))
    return loss, stats | {"ratio/deviation_max": jax.lax.stop_gradient(jnp.max(deviation, initial=0.0))}


def merge_stats(parts: Mapping[str, Float[Array, "parts"]]) -> Stats:
    """Statistics of a batch from those of its parts, stacked: maxima and minima by name, all others added."""
    merge = {"max": jnp.max, "min": jnp.min}
    return {name: merge.get(name[-3:], jnp.sum)(values, axis=0) for name, values in parts.items()}


def _valid(name: str, array: Tokens | Float[Array, "batch"], mask: Tokens) -> Tokens:
    """Zeros at masked places: a weight of zero alone would make NaN of what stands there, in the gradient too.

    Raises:
        ValueError: another shape; in a batch of one, or of one token, nobody would see that it was broadcast.
    """
    shapes = [mask.shape, mask.shape[:1]] if name == "advantages" else [mask.shape]
    if array.shape not in shapes:
        raise ValueError(f"{name}: got shape {array.shape}, takes {' or '.join(map(str, shapes))}, as the mask has")
    return jnp.where(mask > 0, array[:, None] if array.ndim == 1 else array, 0.0)


def _means(stats: TokenStats, weights: Tokens) -> Stats:
    return {name: jnp.sum(jax.lax.stop_gradient(value) * weights) for name, value in stats.items()}
