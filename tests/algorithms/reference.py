"""The formulas in NumPy, float64, sample by sample and token by token: what the library is compared with."""

import numpy as np

MAX_LOG_RATIO = 20.0
FIELDS = {"clip_low": 0.2, "clip_high": None, "dual_clip": None, "level": "token", "reduction": "token_mean"}
FIELDS |= {"constant_length": None, "kl_coef": 0.0, "kl_kind": "k3"}


def clamp(value):
    return min(max(value, -MAX_LOG_RATIO), MAX_LOG_RATIO)


def kl(logprob, ref, kind):
    """The estimate, and its derivative by ``logprob``."""
    d = clamp(float(logprob) - float(ref))
    inside = abs(float(logprob) - float(ref)) < MAX_LOG_RATIO
    value = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kind]
    slope = {"k1": 1.0, "k2": d, "k3": 1 - np.exp(-d)}[kind]
    return value, slope * inside


def clipped(ratio, advantage, low, high, dual):
    """PPO's loss of one ratio, its derivative by the ratio, and which bounds hold."""
    plain, bounded = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
    value, slope = (plain, -advantage) if plain >= bounded else (bounded, 0.0)
    is_low, is_high = advantage < 0 and ratio < 1 - low, advantage > 0 and ratio > 1 + high
    is_dual = dual is not None and advantage < 0 and value > -advantage * dual
    if is_dual:
        value, slope = -advantage * dual, 0.0
    return value, slope, {"low": is_low, "high": is_high, "region": is_low or is_high, "dual": is_dual}


def policy_loss(fields, logprobs, old, advantages, mask, ref=None):
    """Loss, gradient by ``logprobs``, statistics, and the sum of the absolute terms of the loss."""
    f = FIELDS | fields
    low, high = f["clip_low"], f["clip_low"] if f["clip_high"] is None else f["clip_high"]
    rows = [[t for t in range(mask.shape[1]) if mask[i, t] > 0] for i in range(mask.shape[0])]
    tokens, sequences = sum(map(len, rows)), sum(bool(r) for r in rows)
    loss, size, gradient = 0.0, 0.0, np.zeros(mask.shape)
    stats = dict.fromkeys(["ratio/mean", "ratio/deviation_mean", "ratio/deviation_max", "policy_kl"], 0.0)
    stats |= {f"clip_ratio/{name}_mean": 0.0 for name in ("low", "high", "region")}
    stats |= {"clip_ratio/dual_mean": 0.0} if f["dual_clip"] is not None else {}
    stats |= {"kl": 0.0} if f["kl_coef"] else {}
    for i, row in enumerate(rows):
        difference = {t: float(logprobs[i, t]) - float(old[i, t]) for t in row}
        log_ratio = {t: clamp(d) for t, d in difference.items()}
        for t in row:
            weight = {
                "token_mean": 1 / max(tokens, 1),
                "sequence_mean": 1 / max(sequences, 1) / len(row),
                "sequence_sum": 1 / max(sequences, 1),
                "constant": 1 / max(sequences, 1) / (f["constant_length"] or 1),
            }[f["reduction"]]
            spread = {t: 1.0} if f["level"] == "token" else {u: 1 / len(row) for u in row}
            ratio = np.exp(sum(share * log_ratio[u] for u, share in spread.items()))
            advantage = float(advantages[i] if advantages.ndim == 1 else advantages[i, t])
            value, slope, bounds = clipped(ratio, advantage, low, high, f["dual_clip"])
            for u, share in spread.items():
                gradient[i, u] += weight * slope * ratio * share * (abs(difference[u]) < MAX_LOG_RATIO)
            if f["kl_coef"]:
                estimate, kl_slope = kl(logprobs[i, t], ref[i, t], f["kl_kind"])
                value += f["kl_coef"] * estimate
                gradient[i, t] += weight * f["kl_coef"] * kl_slope
                stats["kl"] += estimate / tokens
            loss, size = loss + weight * value, size + weight * abs(value)
            share = 1 / tokens if f["level"] == "token" else 1 / sequences / len(row)
            stats["ratio/mean"] += ratio * share
            for name, holds in bounds.items():
                if f"clip_ratio/{name}_mean" in stats:
                    stats[f"clip_ratio/{name}_mean"] += holds * share
            deviation = abs(np.exp(log_ratio[t]) - 1)
            stats["ratio/deviation_mean"] += deviation / tokens
            stats["ratio/deviation_max"] = max(stats["ratio/deviation_max"], deviation)
            stats["policy_kl"] += (np.exp(log_ratio[t]) - 1 - log_ratio[t]) / tokens
    return loss, gradient, stats, size


def group_advantages(rewards, group_ids, baseline, scale, eps=1e-6):
    """Advantages by the definitions; NaN rewards count nowhere."""
    rewards = rewards.astype(np.float64)
    batch = rewards[~np.isnan(rewards)]
    result = np.zeros(len(rewards))
    for i, reward in enumerate(rewards):
        if np.isnan(reward):
            continue
        members = [j for j, g in enumerate(group_ids) if g == group_ids[i] and not np.isnan(rewards[j])]
        group, others = [rewards[j] for j in members], [rewards[j] for j in members if j != i]
        base = {
            "mean": sum(group) / len(group),
            "leave_one_out": sum(others) / len(others) if others else reward,
            "none": 0.0,
        }[baseline]
        values = {"std": np.array(group), "batch_std": batch, "none": np.zeros(0)}[scale]
        varied = len(values) > 1 and np.ptp(values) > 0
        centred = 0.0 if baseline != "none" and len(set(group)) == 1 else reward - base
        result[i] = centred / (values.std(ddof=1) + eps if varied else 1.0)
    return result
