"""Policy losses: from the losses of tokens to one number, its gradient, and its statistics."""

from __future__ import annotations

import numpy as np

from tests.algorithms.reference.batch import Batch, Fields, mean
from tests.algorithms.reference.divergence import estimate
from tests.algorithms.reference.selection import by_covariance, by_entropy, correction_weight, teaches
from tests.algorithms.reference.surrogates import LOSSES, log_ratio


def token_weight(reduction: str, constant_length: int | None, lengths: list[int], i: int) -> float:
    """What the losses of row i's tokens are multiplied with."""
    sequences = sum(length > 0 for length in lengths)
    return {
        "token_mean": 1 / sum(lengths),
        "sequence_mean": 1 / sequences / lengths[i],
        "sequence_sum": 1 / sequences,
        "constant": 1 / sequences / (constant_length or 1),
    }[reduction]


def select(f: Fields, b: Batch) -> None:
    """Once for a batch: what follows from the detached log-probabilities alone."""
    b.chosen, b.kept = by_covariance(f, b), by_entropy(f, b)


def token_losses(f: Fields, b: Batch) -> np.ndarray:
    """The weighted losses, whose sum is the loss."""
    losses, lengths = np.zeros(b.mask.shape), [len(row) for row in b.rows]
    for i, t in b.places:
        loss = LOSSES[f.objective](f, b, i, t)
        loss *= correction_weight(f, b, i, t) * teaches(f, b, i, t) * ((i, t) in b.kept)
        if f.kl_coef:
            b.compare(abs(b.logprobs[i, t] - b.ref[i, t]), 20.0)
            kl = estimate(b.logprobs[i, t], b.frozen[i, t], b.ref[i, t], f.kl_kind)
            loss += f.kl_coef * kl * (np.exp(b.now(i, t)) if f.kl_weighted else 1.0)
        losses[i, t] = loss * token_weight(f.reduction, f.constant_length, lengths, i)
    return losses


def policy_loss(f: Fields, b: Batch) -> tuple[float, float]:
    """The loss, and the sum of the absolute terms of it, which its rounding is measured by."""
    select(f, b)
    losses = token_losses(f, b)
    return losses.sum(), np.abs(losses).sum()


def gradient(f: Fields, b: Batch, step: float = 1e-6) -> np.ndarray:
    """By central differences, token by token; terms that do not move cancel exactly."""
    select(f, b)
    result = np.zeros(b.mask.shape)
    for place in b.places:
        up, down = b.moved(place, step), b.moved(place, -step)
        rise = (token_losses(f, up) - token_losses(f, down)).sum()
        result[place] = rise / (up.logprobs[place] - down.logprobs[place])
    return result


def statistics(f: Fields, b: Batch) -> dict[str, float]:
    """Those that every objective has: over tokens, but the ratio's over sequences where it is theirs."""
    if not b.places:
        return {}
    difference = [b.then(*place) for place in b.places]
    deviation = [abs(np.exp(d) - 1) for d in difference]
    lengths = [len(row) for row in b.rows]
    by_level = "token_mean" if f.level == "token" else "sequence_mean"
    weights = [token_weight(by_level, None, lengths, i) for i, _ in b.places]
    ratios = [np.exp(log_ratio(f, b, *place)) for place in b.places]
    stats = {
        "ratio/mean": sum(w * r for w, r in zip(weights, ratios)),
        "ratio/deviation_mean": mean(deviation),
        "ratio/deviation_max": max(deviation),
        "policy_kl": mean(np.exp(d) - 1 - d for d in difference),
    }
    if f.kl_coef:
        stats["kl"] = mean(estimate(b.frozen[p], b.frozen[p], b.ref[p], f.kl_kind) for p in b.places)
    if f.objective == "clip" and f.level != "geometric":
        stats |= _clip_statistics(f, b, weights, ratios)
    return stats


def _clip_statistics(f: Fields, b: Batch, weights: list[float], ratios: list[float]) -> dict[str, float]:
    names = ["low", "high", "region"] + ["dual"] * (f.dual_clip is not None)
    stats = {f"clip_ratio/{name}_mean": 0.0 for name in names}
    for place, weight, ratio in zip(b.places, weights, ratios):
        advantage = b.advantages[place]
        low, high = advantage < 0 and ratio < f.low, advantage > 0 and ratio > f.high
        dual = f.dual_clip is not None and advantage < 0 and ratio > f.dual_clip
        for name, holds in zip(("low", "high", "region", "dual"), (low, high, low or high, dual)):
            if name in names:
                stats[f"clip_ratio/{name}_mean"] += holds * weight
    return stats
