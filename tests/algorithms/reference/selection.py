"""Which tokens are picked out of a batch, and with what weight tokens count that another policy sampled."""

from __future__ import annotations

import math

import numpy as np

from tests.algorithms.reference.batch import Batch, Fields, clamp, mean

Places = set[tuple[int, int]]


def share(fraction: float, count: int) -> int:
    return math.ceil(fraction * count * (1 - 1e-6))


def highest(values: dict[tuple[int, int], float], count: int) -> Places:
    """Of equal values those of lower index."""
    return set(sorted(values, key=lambda place: (-values[place], place))[:count])


def covariances(b: Batch) -> dict[tuple[int, int], float]:
    advantage, logprob = (mean(a[p] for p in b.places) for a in (b.advantages, b.frozen))
    return {p: (b.advantages[p] - advantage) * (b.frozen[p] - logprob) for p in b.places}


def by_covariance(f: Fields, b: Batch) -> Places:
    """What clip_cov drops and kl_cov adds a penalty to."""
    if f.objective not in ("clip_cov", "kl_cov") or not b.places:
        return set()
    values, count = covariances(b), share(f.cov_share, len(b.places))
    # Of float32, which the differences of numbers of this size were rounded to.
    scale = 1 + max(abs(b.advantages[p]) for p in b.places) * (1 + max(abs(b.frozen[p]) for p in b.places))
    if f.objective == "kl_cov":
        ranked = sorted(values.values(), reverse=True)
        if 0 < count < len(ranked):
            b.compare(ranked[count - 1], ranked[count], scale)
        return highest(values, count)
    candidates = {}
    for place in b.places:
        ratio, advantage = np.exp(b.then(*place)), b.advantages[place]
        b.compare(values[place], f.cov_low, scale)
        b.compare(values[place], f.cov_high, scale)
        b.compare(ratio, f.low)
        b.compare(ratio, f.high)
        clipped = (advantage < 0 and ratio < f.low) or (advantage > 0 and ratio > f.high)
        if f.cov_low < values[place] < f.cov_high and not clipped:
            candidates[place] = float(b.scores[place])
    return highest(candidates, count)


def by_entropy(f: Fields, b: Batch) -> Places:
    """Tokens that keep their loss."""
    if f.entropy_share is None:
        return set(b.places)
    rows = [[(i, t) for t in row] for i, row in enumerate(b.rows)]
    parts = [b.places] if f.entropy_scope == "batch" else rows
    kept = [highest({p: b.entropies[p] for p in part}, share(f.entropy_share, len(part))) for part in parts]
    return set().union(*kept)


def correction_weight(f: Fields, b: Batch, i: int, t: int) -> float:
    if f.correction == "none":
        return 1.0
    differences = {u: clamp(b.old[i, u] - b.sampler[i, u]) for u in b.rows[i]}
    log_weight = {
        "token": differences[t],
        "sequence": clamp(sum(differences.values())),
        "geometric": mean(differences.values()),
    }[f.correction_level]
    weight = np.exp(log_weight)
    if f.correction == "truncate":
        return min(max(weight, f.correction_low), f.correction_high)
    b.compare(weight, f.correction_low)
    b.compare(weight, f.correction_high)
    return weight if f.correction_low <= weight <= f.correction_high else 0.0


def teaches(f: Fields, b: Batch, i: int, t: int) -> bool:
    """Not: a negative advantage in a row that has left its sampler."""
    if f.sequence_mask is None:
        return True
    gap = mean(clamp(b.sampler[i, u] - b.frozen[i, u]) for u in b.rows[i])
    b.compare(gap, f.sequence_mask)
    return not (b.advantages[i, t] < 0 and gap > f.sequence_mask)
