"""The algorithm's section: a named recipe, and any field of it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxrft.config.base import ConfigError, Section, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Section):
    """The algorithm: a named recipe, and any of its fields changed. None means the recipe's value."""

    recipe: str = option(
        "grpo",
        "Name of the recipe: cispo, clip_cov, cpgd, dapo, dr_grpo, gmpo, grpo, gspo, kl_cov, opo, ppo, reinforce, "
        "reinforce_pp, reinforce_pp_baseline, remax, rloo, sapo or tis_grpo; or one's own, as package.module:function "
        "or file.py:function, a function without arguments that returns a Recipe.",
    )

    dynamic_sampling: bool | None = option(
        None, "Drop groups of equal rewards, and draw prompts until the rollout is whole (DAPO)."
    )
    max_draws: int | None = option(
        None, "Dynamic sampling draws at most this many times the prompts of a rollout.", minimum=1
    )
    difficulty_low: float | None = option(
        None, "Groups with a lower mean reward are left out, or replaced with dynamic_sampling."
    )
    difficulty_high: float | None = option(None, "The same for groups with a higher mean reward.")

    overlong_buffer: float | None = option(
        None,
        "Share of max_completion_length, at its end, that is punished in the reward (DAPO); 0: none.",
        minimum=0,
        maximum=1,
    )
    overlong_factor: float | None = option(None, "What is subtracted from the reward at full length.", minimum=0)
    length_penalty: float | None = option(
        None, "Subtracted from the reward, times the share of max_completion_length that is taken.", minimum=0
    )
    running_norm: Literal["none", "scale", "standardize"] | None = option(
        None,
        "Divide rewards by the standard deviation of all that the run has seen (scale), and subtract their mean before "
        "(standardize).",
    )
    reward_clip: float | None = option(None, "Clip rewards to plus and minus this.", minimum=0)

    estimator: Literal["group", "gae"] | None = option(
        None, "Advantages from rewards and a baseline, or from a critic (which this version does not have)."
    )
    baseline: Literal["mean", "leave_one_out", "length", "greedy", "batch_mean", "none"] | None = option(
        None,
        "What is subtracted from a reward: mean of its group, mean of the group's others, the group's mean weighted by "
        "length (OPO), the reward of a greedy completion (ReMax), mean of the batch, or nothing.",
    )
    scale: Literal["std", "batch_std", "mean", "none"] | None = option(
        None,
        "What it is divided by: standard deviation of its group, of the batch, the group's mean (MaxRL), or nothing "
        "(scale_rewards).",
    )
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = option(
        None, "Several rewards are summed before baseline and scale, or after (GDPO; multi_objective_aggregation)."
    )
    group_weight: Literal["none", "informative"] | None = option(
        None, "Multiply advantages by samples over samples in groups of different rewards (GPG)."
    )
    group_weight_cap: float | None = option(None, "Bound of that weight (CPGD: 3).", minimum=1)
    gamma: float | None = option(None, "Discount of one token.", minimum=0, maximum=1)
    lam: float | None = option(None, "Lambda of a critic's advantages.", minimum=0, maximum=1)
    length_alpha: float | None = option(None, "Lambda by the length of the response in its place (VAPO).", above=0)
    whiten: bool | None = option(None, "Bring the advantages of the batch's tokens to mean 0 and variance 1.")
    advantage_clip: float | None = option(None, "Clip advantages to plus and minus this.", minimum=0)

    objective: str | None = option(
        None,
        "Loss of a token: clip, cispo, cpgd, reinforce, sapo, clip_cov, kl_cov, dppo_tv, dppo_kl, dro, luspo, vespo, "
        "gvpo, or one that the recipe's file registers.",
    )
    level: Literal["token", "sequence", "sequence_token", "geometric"] | None = option(
        None,
        "Whose importance ratio: of a token; of a sequence (exp of the mean log-ratio, GSPO), or that value with the "
        "gradient of each token; the geometric mean of clipped tokens (GMPO).",
    )
    clip_low: float | None = option(None, "Ratios below 1 - clip_low are clipped (epsilon).", minimum=0)
    clip_high: float | None = option(None, "Ratios above 1 + clip_high are clipped (epsilon_high).", minimum=0)
    dual_clip: float | None = option(
        None, "Bound on the loss of a negative advantage, as a multiple of it; above 1.", above=1
    )
    ratio_cap: float | None = option(
        None, "Bound of ratios that are not clipped; above 1 + clip_high (delta).", above=1
    )
    drift_coef: float | None = option(None, "cpgd: weight of the drift towards the old policy.", minimum=0)
    drift_clip: float | None = option(None, "cpgd: largest slope of that drift.", minimum=0)
    sapo_positive: float | None = option(
        None, "sapo: sharpness of the gate for positive advantages (sapo_temperature_pos).", above=0
    )
    sapo_negative: float | None = option(None, "sapo: for all others (sapo_temperature_neg).", above=0)
    cov_share: float | None = option(
        None, "clip_cov, kl_cov: share of the tokens that are chosen by their covariance.", minimum=0, maximum=1
    )
    cov_low: float | None = option(None, "clip_cov: least covariance of a token that may be chosen.")
    cov_high: float | None = option(None, "clip_cov: largest covariance of a token that may be chosen.")
    cov_coef: float | None = option(None, "kl_cov: weight of the chosen tokens' |log-ratio|.", minimum=0)
    dro_coef: float | None = option(None, "dro: weight of half the squared log-ratio.", minimum=0)
    gvpo_coef: float | None = option(None, "gvpo: scale of the implied rewards.", minimum=0)
    vespo_positive: list[float] | None = option(
        None, "vespo: shape [k, lambda] of the weight for advantages from 0 on.", minimum=0
    )
    vespo_negative: list[float] | None = option(None, "vespo: for negative advantages.", minimum=0)
    entropy_share: float | None = option(
        None,
        "Train only this share of the tokens, those of highest entropy (top_entropy_quantile).",
        above=0,
        maximum=1,
    )
    entropy_scope: Literal["batch", "sequence"] | None = option(
        None, "That share is taken of a step's tokens, or of each sequence."
    )
    correction: Literal["none", "truncate", "mask"] | None = option(
        None,
        "Weight each token by the trainer's probability over the engine's: limited (truncated importance sampling), or "
        "0 outside the limits.",
    )
    correction_level: Literal["token", "sequence", "geometric"] | None = option(
        None, "That ratio is a token's, a sequence's (the product), or the geometric mean of a sequence's."
    )
    correction_low: float | None = option(None, "Lower limit of that ratio.", minimum=0)
    correction_high: float | None = option(None, "Upper limit of that ratio.", minimum=0)
    sequence_mask: float | None = option(
        None,
        "Sequences of negative advantage teach nothing once their mean log-probability has fallen this far below the "
        "engine's (off_policy_mask_threshold).",
        minimum=0,
    )
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] | None = option(
        None,
        "How token losses become one number: mean over tokens (dapo), mean over sequences of token means (grpo) or "
        "token sums, or sum over sequences times max_completion_length (dr_grpo).",
    )
    kl_coef: float | None = option(
        None, "Weight of the KL to the reference model, in the loss or the rewards (beta).", minimum=0
    )
    kl_kind: Literal["k1", "k2", "k3", "k1+", "k3+"] | None = option(
        None, "Estimator of that KL; k1+ and k3+ have the value of k1 and k3, and the gradient of k2."
    )
    kl_weighted: bool | None = option(
        None, "Multiply the KL in the loss by the token's ratio, which makes it unbiased (use_bias_correction_kl)."
    )

    kl_in_reward: bool | None = option(
        None, "Subtract the KL from the tokens' rewards in place of adding it to the loss."
    )
    kl_target: float | None = option(None, "Adapt kl_coef so that the KL comes close to this.", above=0)
    kl_horizon: int | None = option(None, "Completions in which kl_coef changes by a fifth at most.", minimum=1)

    def check(self) -> None:
        for field in ("vespo_positive", "vespo_negative"):
            value = getattr(self, field)
            if value is not None and len(value) != 2:
                raise ConfigError(f"{field}: got {value!r}, takes two numbers, [k, lambda]")
