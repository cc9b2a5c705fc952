"""Rewards: rules, mathematics, a user's own functions, and how they combine."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "MathReward": "jaxrft.rewards.math_reward",
        "RewardError": "jaxrft.rewards.records",
        "RewardSet": "jaxrft.rewards.combine",
        "Scores": "jaxrft.rewards.records",
        "exact_match": "jaxrft.rewards.rules",
        "format_boxed": "jaxrft.rewards.rules",
        "format_tags": "jaxrft.rewards.rules",
        "length": "jaxrft.rewards.rules",
        "load_rewards": "jaxrft.rewards.load",
    },
)
