"""The losses of one token, by the name of the objective: of fields, batch, row and time."""

from __future__ import annotations

import math

import numpy as np

from tests.algorithms.reference.batch import Batch, Fields, clamp, mean


def log_ratio(f: Fields, b: Batch, i: int, t: int) -> float:
    """By level."""
    row = b.rows[i]
    if f.level == "token":
        return b.now(i, t)
    if f.level == "sequence":
        return mean(b.now(i, u) for u in row)
    if f.level == "sequence_token":
        return mean(b.then(i, u) for u in row) + b.now(i, t) - b.then(i, t)
    clipped = []
    for u in row:
        d = b.now(i, u)
        b.compare(d, -f.clip_low)
        b.compare(d, f.above)
        c = min(max(d, -f.clip_low), f.above)
        clipped.append(min(d, c) if b.advantages[i, u] > 0 else max(d, c))
    return mean(clipped)


def detached_log_ratio(f: Fields, b: Batch, i: int, t: int) -> float:
    return b.then(i, t) if f.level == "token" else mean(b.then(i, u) for u in b.rows[i])


def clipped_ratio_loss(f: Fields, b: Batch, ratio: float, advantage: float) -> float:
    for bound in (f.low, f.high, f.ratio_cap, f.dual_clip):
        b.compare(ratio, math.inf if bound is None else bound)
    free = ratio if f.ratio_cap is None else min(ratio, f.ratio_cap)
    loss = max(-advantage * free, -advantage * min(max(ratio, f.low), f.high))
    if f.dual_clip is not None and advantage < 0:
        loss = min(loss, f.dual_clip * abs(advantage))
    return loss


def clip(f: Fields, b: Batch, i: int, t: int) -> float:
    ratio, advantage = np.exp(log_ratio(f, b, i, t)), b.advantages[i, t]
    return -advantage * ratio if f.level == "geometric" else clipped_ratio_loss(f, b, ratio, advantage)


def cispo(f: Fields, b: Batch, i: int, t: int) -> float:
    ratio = np.exp(detached_log_ratio(f, b, i, t))
    return -min(max(ratio, f.low), f.high) * b.advantages[i, t] * b.logprobs[i, t]


def reinforce(f: Fields, b: Batch, i: int, t: int) -> float:
    return -b.advantages[i, t] * b.logprobs[i, t]


def drift(f: Fields, b: Batch, d: float) -> float:
    """r - 1 - d, continued by its tangent where its slope exceeds ``drift_clip``."""
    c = f.drift_clip
    b.compare(np.exp(d), 1 + c)
    if np.exp(d) <= 1 + c:
        return np.exp(d) - 1 - d
    return (c - np.log(1 + c)) + c * (d - np.log(1 + c))


def cpgd(f: Fields, b: Batch, i: int, t: int) -> float:
    d, advantage = b.now(i, t), b.advantages[i, t]
    for bound in (f.low, f.high, f.dual_clip):
        b.compare(d, math.inf if bound is None else np.log(bound))
    loss = -min(d * advantage, min(max(d, np.log(f.low)), np.log(f.high)) * advantage)
    if f.dual_clip is not None and advantage < 0:
        loss = min(loss, abs(advantage) * np.log(f.dual_clip))
    return loss + f.drift_coef * drift(f, b, d)


def sapo(f: Fields, b: Batch, i: int, t: int) -> float:
    advantage = b.advantages[i, t]
    tau = f.sapo_positive if advantage > 0 else f.sapo_negative
    gate = 1 / (1 + np.exp(-tau * (np.exp(log_ratio(f, b, i, t)) - 1)))
    return -advantage * 4 / tau * gate


def clip_cov(f: Fields, b: Batch, i: int, t: int) -> float:
    return 0.0 if (i, t) in b.chosen else clip(f, b, i, t)


def kl_cov(f: Fields, b: Batch, i: int, t: int) -> float:
    d = b.now(i, t)
    b.compare(d or math.inf, 0.0)  # At 0 itself the difference quotient of |d| is 0, as its gradient is to be.
    return -b.advantages[i, t] * np.exp(d) + ((i, t) in b.chosen) * f.cov_coef * abs(d)


def _gated(b: Batch, i: int, t: int, gate: bool) -> float:
    return -b.advantages[i, t] * min(np.exp(b.then(i, t)), 20.0) * b.logprobs[i, t] * gate


def dppo_tv(f: Fields, b: Batch, i: int, t: int) -> float:
    change = np.exp(b.frozen[i, t]) - np.exp(b.old[i, t])
    b.compare(change, f.above)
    b.compare(change, -f.clip_low)
    closed = change > f.above if b.advantages[i, t] > 0 else change < -f.clip_low
    return _gated(b, i, t, not closed)


def dppo_kl(f: Fields, b: Batch, i: int, t: int) -> float:
    new, old = min(b.frozen[i, t], 0.0), min(b.old[i, t], 0.0)
    rest_new, rest_old = (max(-np.expm1(x), 1e-7) for x in (new, old))
    divergence = np.exp(old) * (old - new) + rest_old * np.log(rest_old / rest_new)
    bound = f.above if b.advantages[i, t] > 0 else f.clip_low
    b.compare(divergence, bound)
    away = new > old if b.advantages[i, t] > 0 else new < old
    return _gated(b, i, t, not (away and divergence > bound))


def luspo(f: Fields, b: Batch, i: int, t: int) -> float:
    ratio = np.exp(mean(b.now(i, u) for u in b.rows[i]))
    return len(b.rows[i]) * clipped_ratio_loss(f, b, ratio, b.advantages[i, t])


def vespo(f: Fields, b: Batch, i: int, t: int) -> float:
    log_weight = clamp(sum(b.then(i, u) for u in b.rows[i]))
    k, lam = f.vespo_positive if b.advantages[i, t] >= 0 else f.vespo_negative
    return -np.exp(lam + k * log_weight - lam * np.exp(log_weight)) * b.advantages[i, t] * b.logprobs[i, t]


def dro(f: Fields, b: Batch, i: int, t: int) -> float:
    return -(b.advantages[i, t] * b.logprobs[i, t] - f.dro_coef / 2 * b.now(i, t) ** 2)


def gvpo(f: Fields, b: Batch, i: int, t: int) -> float:
    """Half the squared error of the centred implied rewards."""
    members = [j for j, row in enumerate(b.rows) if row and b.groups[j] == b.groups[i]]
    implied = {}
    for j in members:
        total = sum(b.now(j, u) for u in b.rows[j])
        b.compare(abs(total), 20.0)
        implied[j] = clamp(total)
    given = {j: mean(b.advantages[j, u] for u in b.rows[j]) for j in members}
    error = f.gvpo_coef * (implied[i] - mean(implied.values())) - (given[i] - mean(given.values()))
    return error**2 / 2


LOSSES = {
    loss.__name__: loss
    for loss in (clip, cispo, reinforce, cpgd, sapo, clip_cov, kl_cov, dppo_tv, dppo_kl, luspo, vespo, dro, gvpo)
}
