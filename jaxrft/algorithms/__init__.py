"""The mathematics of policy optimisation: pure functions of ``[batch, time]`` float32 arrays and a mask."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "AdvantageEstimator": "jaxrft.algorithms.registry",
        "PolicyObjective": "jaxrft.algorithms.objectives",
        "Recipe": "jaxrft.algorithms.registry",
        "Totals": "jaxrft.algorithms.reductions",
        "group_advantages": "jaxrft.algorithms.advantages",
        "kl": "jaxrft.algorithms.divergence",
        "merge_stats": "jaxrft.algorithms.objectives",
        "policy_loss": "jaxrft.algorithms.objectives",
        "recipe": "jaxrft.algorithms.registry",
        "recipes": "jaxrft.algorithms.registry",
        "token_weights": "jaxrft.algorithms.reductions",
        "totals": "jaxrft.algorithms.reductions",
    },
)
