"""The critic's loss."""

from __future__ import annotations

import numpy as np

from tests.algorithms.reference.policy import token_weight


def value_loss(values, old, returns, mask, clip=0.2, reduction="token_mean") -> tuple[float, np.ndarray, float]:
    """Loss, gradient in closed form, and the share of clipped tokens' margin: the least distance from a kink."""
    lengths = [int(row.sum()) for row in np.asarray(mask)]
    loss, slopes, margin = 0.0, np.zeros(mask.shape), np.inf
    for i, t in zip(*np.nonzero(mask)):
        v, o, r = (float(a[i, t]) for a in (values, old, returns))
        weight = token_weight(reduction, None, lengths, i)
        plain, slope = (v - r) ** 2, v - r
        if clip is not None:
            bounded = (min(max(v, o - clip), o + clip) - r) ** 2
            inside = o - clip <= v <= o + clip
            margin = min(margin, abs(abs(v - o) - clip), np.inf if inside else abs(plain - bounded))
            plain, slope = (plain, slope) if plain >= bounded else (bounded, 0.0)
        loss, slopes[i, t] = loss + weight * plain / 2, weight * slope
    return loss, slopes, margin
