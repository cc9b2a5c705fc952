"""Metrics of a rollout and of the optimizer steps made on it, by TRL's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrft.rollout.transfer.send import Report
from jaxrft.training.batch import TrainBatch, in_list_order
from jaxrft.training.rollouts import RolloutBatch


def nanmean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN without a warning where all is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def reward_metrics(rollout: RolloutBatch) -> dict[str, float]:
    """Mean and spread of the rewards; ``reward_std`` is the mean over groups of the spread within one."""
    total = rollout.scores.total.reshape(-1, rollout.group)
    valid = [group[~np.isnan(group)] for group in total]
    spreads = np.array([group.std(ddof=1) if group.size > 1 else 0.0 for group in valid])
    equal = np.array([group.size == 0 or np.ptp(group) == 0 for group in valid])
    metrics = {
        "reward": nanmean(rollout.scores.total),
        "reward_std": float(spreads.mean()),
        "frac_reward_zero_std": float(equal.mean()),
        "rewards/errors": float(rollout.scores.errors),
        **rollout.scores.metrics,
    }
    for name, values in rollout.scores.components.items():
        valid_values = values[~np.isnan(values)]
        metrics[f"rewards/{name}/mean"] = nanmean(values)
        metrics[f"rewards/{name}/std"] = float(valid_values.std(ddof=1)) if valid_values.size > 1 else float("nan")
    return metrics


def length_metrics(rollout: RolloutBatch) -> dict[str, float]:
    """Lengths of the completions in tokens, and the share that was cut off."""
    lengths = rollout.lengths
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(rollout.truncated.mean()),
    }


def evaluation_metrics(rollout: RolloutBatch) -> dict[str, float]:
    """What is reported of held-out prompts."""
    rewards = reward_metrics(rollout)
    kept = {k: v for k, v in rewards.items() if k == "reward" or k.startswith("rewards/")}
    lengths = length_metrics(rollout)
    return {
        **{f"eval/{k}": v for k, v in kept.items()},
        "eval/completions/mean_length": lengths["completions/mean_length"],
        "eval/completions/clipped_ratio": lengths["completions/clipped_ratio"],
    }


def throughput(seconds: Mapping[str, float], completion_tokens: int, trained_tokens: int) -> dict[str, float]:
    """Tokens per second: generated ones over the rollout's time, prompt and response over training's."""
    pairs = {"rollout": completion_tokens, "training": trained_tokens}
    return {
        f"tokens_per_second/{phase}": tokens / seconds[f"time/{phase}"]
        for phase, tokens in pairs.items()
        if seconds.get(f"time/{phase}", 0.0) > 0
    }


def transfer_metrics(report: Report | None) -> dict[str, float]:
    """What the last transfer of weights to servers took; nothing where none are copied."""
    if report is None:
        return {}
    return {"weights/seconds": report.seconds, "weights/bytes": report.bytes, "weights/buckets": report.buckets}


def mean_advantages(batch: TrainBatch) -> np.ndarray:
    """Mean advantage of each listed sample's trained tokens, float32 [samples]; 0 without any."""
    advantages, mask = (in_list_order(batch, a) for a in (batch.advantages, batch.mask))
    return (np.where(mask > 0, advantages, 0.0).sum(-1) / np.maximum(mask.sum(-1), 1.0)).astype(np.float32)


def completion_rows(rollout: RolloutBatch, advantages: np.ndarray) -> list[dict[str, Any]]:
    """One record a sample, for the file of completions; ``advantages`` are the mean over its tokens."""

    def number(value: float) -> float | None:
        return None if np.isnan(value) else round(float(value), 6)

    return [
        {
            "prompt": rollout.prompt_of(i).value,
            "prompt_index": rollout.prompt_of(i).index,
            "completion": text,
            "reward": number(rollout.scores.total[i]),
            "rewards": {name: number(values[i]) for name, values in rollout.scores.components.items()},
            "advantage": number(advantages[i]),
            "tokens": len(rollout.completions[i].token_ids),
            "finish_reason": rollout.completions[i].finish_reason,
            "weight_version": rollout.completions[i].versions[-1][1],
        }
        for i, text in enumerate(rollout.texts)
    ]
