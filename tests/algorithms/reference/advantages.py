"""Advantages of samples, by the definitions; NaN rewards count nowhere."""

from __future__ import annotations

import numpy as np


def _spread(values: np.ndarray) -> float | None:
    """The deviation with n - 1; None where there is none to speak of."""
    return values.std(ddof=1) if len(values) > 1 and np.ptp(values) > 0 else None


def group_advantages(
    rewards, group_ids, baseline="mean", scale="std", eps=1e-6, *, lengths=None, greedy_rewards=None
) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    known = np.flatnonzero(~np.isnan(rewards))
    result = np.zeros(len(rewards))
    for i in known:
        members = [j for j in known if group_ids[j] == group_ids[i]]
        group, others = rewards[members], rewards[[j for j in members if j != i]]
        if baseline == "leave_one_out" and not len(others):
            continue
        if baseline == "greedy" and np.isnan(greedy_rewards[group_ids[i]]):
            continue
        if baseline == "mean":
            base = group.mean()
        elif baseline == "leave_one_out":
            base = others.mean()
        elif baseline == "length":
            counts = np.asarray(lengths, np.float64)[members]
            base = (counts * group).sum() / counts.sum()
        elif baseline == "greedy":
            base = float(greedy_rewards[group_ids[i]])
        elif baseline == "batch_mean":
            base = rewards[known].mean()
        else:
            base = 0.0
        # Equal rewards are their own mean, though the mean of float64 numbers rounds.
        own_mean = baseline in ("mean", "leave_one_out", "length") and np.ptp(group) == 0
        centred = 0.0 if own_mean else rewards[i] - base
        if scale == "mean":
            result[i] = centred / (group.mean() + eps) if group.mean() > 0 else 0.0
        elif scale == "none":
            result[i] = centred
        else:
            spread = _spread(group if scale == "std" else rewards[known])
            result[i] = centred if spread is None else centred / (spread + eps)
    return result


def multi_reward_advantages(components, weights, group_ids, baseline="mean", scale="std", eps=1e-6) -> np.ndarray:
    """Each component normalised within its group, then the weighted sum."""
    parts = [group_advantages(column, group_ids, baseline, scale, eps) for column in np.asarray(components).T]
    return sum(float(weight) * part for weight, part in zip(weights, parts))


def informative_weight(rewards, group_ids, cap=None) -> float:
    """Samples, over those of them in groups whose rewards differ."""
    rewards = np.asarray(rewards, np.float64)
    known = np.flatnonzero(~np.isnan(rewards))
    useful = 0
    for i in known:
        group = [rewards[j] for j in known if group_ids[j] == group_ids[i]]
        useful += max(group) > min(group)
    weight = len(known) / useful if useful else 1.0
    return weight if cap is None else min(weight, cap)
