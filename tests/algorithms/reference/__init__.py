"""The formulas in NumPy, float64, sample by sample and token by token: what the library is compared with.

Written from the formulas alone; slow, and without a trick. Gradients are central differences of the losses.
"""

from tests.algorithms.reference.advantages import (
    group_advantages,
    informative_weight,
    multi_reward_advantages,
)
from tests.algorithms.reference.batch import Batch, Fields, clamp
from tests.algorithms.reference.divergence import kl
from tests.algorithms.reference.policy import gradient, policy_loss, statistics, token_losses, token_weight
from tests.algorithms.reference.returns import gae, length_adaptive_lambda, token_returns, whiten
from tests.algorithms.reference.shaping import adaptive_kl_coef, length_penalty, overlong_penalty, standardize
from tests.algorithms.reference.value import value_loss

__all__ = [
    "Batch",
    "Fields",
    "adaptive_kl_coef",
    "clamp",
    "gae",
    "gradient",
    "group_advantages",
    "informative_weight",
    "kl",
    "length_adaptive_lambda",
    "length_penalty",
    "multi_reward_advantages",
    "overlong_penalty",
    "policy_loss",
    "standardize",
    "statistics",
    "token_losses",
    "token_returns",
    "token_weight",
    "value_loss",
    "whiten",
]
