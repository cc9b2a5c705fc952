"""The named recipes, with the settings that their papers recommend.

The KL to the reference is off in all of them, as recent practice with rewards by rule has it; ``kl_coef`` turns it on,
where and how the paper has it. The pages in docs/algorithms give the papers' own weights.
"""

from __future__ import annotations

from jaxrft.algorithms.estimators import AdvantageEstimator
from jaxrft.algorithms.objectives import PolicyObjective
from jaxrft.algorithms.recipe_parts import GroupFilter, KLControl, Recipe
from jaxrft.algorithms.shaping import RewardShaping

_UNSCALED = AdvantageEstimator(scale="none")
_GRPO = PolicyObjective(reduction="sequence_mean")
_REINFORCE = PolicyObjective(objective="reinforce")

RECIPES: dict[str, Recipe] = {
    # arXiv:2402.03300
    "grpo": Recipe(policy=_GRPO),
    # arXiv:2503.20783: neither the standard deviation nor the response's length biases the gradient.
    "dr_grpo": Recipe(advantage=_UNSCALED, policy=PolicyObjective(reduction="constant")),
    # arXiv:2503.14476: clip-higher, token-level loss, dynamic sampling, soft overlong punishment of the last fifth
    # (4,096 of 20,480 tokens).
    "dapo": Recipe(
        shaping=RewardShaping(overlong_buffer=0.2),
        policy=PolicyObjective(clip_low=0.2, clip_high=0.28, reduction="token_mean"),
        filter=GroupFilter(dynamic_sampling=True),
    ),
    # arXiv:2507.18071
    "gspo": Recipe(policy=PolicyObjective(level="sequence", clip_low=3e-4, clip_high=4e-4, reduction="sequence_mean")),
    # arXiv:2507.20673
    "gmpo": Recipe(policy=PolicyObjective(level="geometric", clip_low=0.4, clip_high=0.4, reduction="sequence_mean")),
    # arXiv:2506.13585, without a lower bound; the upper one, a ratio of 5, is that of arXiv:2510.13786.
    "cispo": Recipe(policy=PolicyObjective(objective="cispo", clip_low=1.0, clip_high=4.0)),
    # arXiv:2402.14740: a response is one action, so its tokens' log-probabilities are summed.
    "rloo": Recipe(
        advantage=AdvantageEstimator(baseline="leave_one_out", scale="none"),
        policy=PolicyObjective(objective="reinforce", reduction="sequence_sum"),
    ),
    # GPG, arXiv:2504.02546
    "reinforce": Recipe(advantage=AdvantageEstimator(scale="none", group_weight="informative"), policy=_REINFORCE),
    # arXiv:2501.03262: the KL, where there is one, in the rewards; the batch is whitened.
    "reinforce_pp": Recipe(
        advantage=AdvantageEstimator(baseline="none", scale="none", whiten=True),
        policy=PolicyObjective(kl_kind="k1"),
        kl=KLControl(kl_in_reward=True),
    ),
    # The same with the group's mean as baseline, and the KL in the loss.
    "reinforce_pp_baseline": Recipe(
        advantage=AdvantageEstimator(scale="none", whiten=True), policy=PolicyObjective(kl_kind="k2")
    ),
    # arXiv:2310.10505
    "remax": Recipe(
        advantage=AdvantageEstimator(baseline="greedy", scale="none"),
        policy=PolicyObjective(objective="reinforce", reduction="sequence_sum"),
    ),
    # arXiv:2505.23585: one update a rollout, exactly on policy.
    "opo": Recipe(advantage=AdvantageEstimator(baseline="length", scale="none"), policy=_REINFORCE),
    # arXiv:2505.12504
    "cpgd": Recipe(policy=PolicyObjective(objective="cpgd", reduction="sequence_mean")),
    # arXiv:2511.20347
    "sapo": Recipe(policy=PolicyObjective(objective="sapo", reduction="sequence_mean")),
    # arXiv:1707.06347, with the critic of arXiv:1506.02438
    "ppo": Recipe(advantage=AdvantageEstimator(estimator="gae", whiten=True)),
    # arXiv:2505.22617, both with the settings for a 7B model
    "clip_cov": Recipe(policy=PolicyObjective(objective="clip_cov")),
    "kl_cov": Recipe(policy=PolicyObjective(objective="kl_cov", cov_share=2e-3)),
    # Yao et al. 2025, 'Your efficient RL framework secretly brings you off-policy RL training'
    "tis_grpo": Recipe(policy=PolicyObjective(reduction="sequence_mean", correction="truncate", correction_high=2.0)),
}
