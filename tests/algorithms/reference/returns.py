"""Returns and advantages of tokens: masked tokens are left out, and what stands behind them moves up."""

from __future__ import annotations

import numpy as np


def _valid(mask) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in np.asarray(mask)]


def token_returns(rewards, mask, gamma=1.0) -> np.ndarray:
    result = np.zeros(mask.shape)
    for i, places in enumerate(_valid(mask)):
        for m, t in enumerate(places):
            result[i, t] = sum(gamma ** (k - m) * float(rewards[i, places[k]]) for k in range(m, len(places)))
    return result


def gae(rewards, values, mask, gamma=1.0, lam=0.95) -> tuple[np.ndarray, np.ndarray]:
    """As the sum that it is, of discounted errors, not as the recursion."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    lam = np.broadcast_to(lam, mask.shape[:1])
    for i, places in enumerate(_valid(mask)):
        v = [float(values[i, t]) for t in places] + [0.0]
        errors = [float(rewards[i, t]) + gamma * v[m + 1] - v[m] for m, t in enumerate(places)]
        for m, t in enumerate(places):
            decay = gamma * float(lam[i])
            advantages[i, t] = sum(decay ** (k - m) * errors[k] for k in range(m, len(errors)))
            returns[i, t] = advantages[i, t] + v[m]
    return advantages, returns


def length_adaptive_lambda(lengths, alpha=0.05) -> list[float]:
    return [min(max(1 - 1 / (alpha * float(n)), 0.0), 1.0) if n else 0.0 for n in lengths]


def whiten(values, mask, shift_mean=True, eps=1e-8) -> np.ndarray:
    result, valid = np.zeros(mask.shape), np.asarray(mask) > 0
    x = np.asarray(values, np.float64)[valid]
    if len(x):
        variance = x.var(ddof=1) if len(x) > 1 else 0.0
        result[valid] = (x - x.mean()) / np.sqrt(variance + eps) + (0.0 if shift_mean else x.mean())
    return result
