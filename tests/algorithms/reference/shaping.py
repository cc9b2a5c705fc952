"""Penalties of length, running moments, and the controller of the KL."""

from __future__ import annotations

import numpy as np


def overlong_penalty(length, max_length, buffer, factor=1.0) -> float:
    return min(-factor * (length - (max_length - buffer)) / buffer, 0.0)


def length_penalty(length, max_length, coef) -> float:
    return -coef * length / max_length


def standardize(values, seen, shift_mean=True, eps=1e-8) -> np.ndarray:
    """By the moments of ``seen``; NaN counts nowhere."""
    seen = np.asarray(seen, np.float64)
    seen = seen[~np.isnan(seen)]
    deviation = seen.std(ddof=1) if len(seen) > 1 and np.ptp(seen) > 0 else 1.0
    mean = seen.mean() if shift_mean and len(seen) else 0.0
    return (np.asarray(values, np.float64) - mean) / deviation


def adaptive_kl_coef(coef, observed, target, horizon, count) -> float:
    return coef * (1 + min(max(observed / target - 1, -0.2), 0.2) * count / horizon)
