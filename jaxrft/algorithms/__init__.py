"""The mathematics of policy optimisation: pure functions of ``[batch, time]`` float32 arrays and a mask."""

from jaxrft.lazy import exports

_MODULES = {
    "advantages": ["group_advantages", "informative_weight", "multi_reward_advantages"],
    "divergence": ["kl"],
    "estimators": ["AdvantageEstimator", "Outcome", "estimate_advantages"],
    "loss": ["merge_stats", "policy_loss"],
    "objectives": ["PolicyObjective"],
    "recipe_parts": ["GroupFilter", "KLControl", "Recipe"],
    "reductions": ["Totals", "token_weights", "totals"],
    "registry": ["recipe", "recipes", "register_objective", "register_recipe"],
    "returns": ["gae", "length_adaptive_lambda", "token_returns", "whiten"],
    "selection": ["Selection", "token_selection"],
    "shaping": [
        "Moments", "RewardShaping", "adaptive_kl_coef", "length_penalty", "length_terms", "merge_moments", "moments",
        "no_moments", "overlong_penalty", "shape_rewards", "standardize",
    ],
    "surrogates": ["Inputs", "Surrogate"],
    "value": ["value_loss"],
}  # fmt: skip

__getattr__, __dir__, __all__ = exports(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
