"""Estimators of the KL divergence of one token."""

from __future__ import annotations

import numpy as np

from tests.algorithms.reference.batch import MAX_LOG_RATIO, clamp


def estimate(logprob: float, frozen: float, ref: float, kind: str) -> float:
    """The estimate; those with a plus have the value of the first letter, and move as k2 does."""
    d, detached = clamp(logprob - ref), clamp(frozen - ref)
    if kind.endswith("+"):
        return estimate(frozen, frozen, ref, kind[:-1]) + (d**2 - detached**2) / 2
    return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kind]


def kl(logprob: float, ref: float, kind: str) -> tuple[float, float]:
    """The estimate, and its derivative by ``logprob`` in closed form."""
    logprob, ref = float(logprob), float(ref)
    d, inside = clamp(logprob - ref), abs(logprob - ref) < MAX_LOG_RATIO
    slope = {"k1": 1.0, "k2": d, "k3": 1 - np.exp(-d), "k1+": d, "k3+": d}[kind]
    return estimate(logprob, logprob, ref, kind), slope * inside
