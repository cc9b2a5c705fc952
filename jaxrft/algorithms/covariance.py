"""Objectives that pick tokens by the covariance of log-probability and advantage (arXiv:2505.22617)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxrft.algorithms.surrogates import Inputs, Tokens, TokenStats, clip

if TYPE_CHECKING:
    from jaxrft.algorithms.objectives import PolicyObjective


def clip_cov(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """The clipped surrogate without the tokens chosen: some, at random, of high covariance."""
    assert x.chosen is not None
    losses, stats = clip(objective, x)
    return losses * (1.0 - x.chosen), stats | {"covariance/chosen_mean": x.chosen}


def kl_cov(objective: PolicyObjective, x: Inputs) -> tuple[Tokens, TokenStats]:
    """-A r, and for the tokens chosen, those of highest covariance, ``cov_coef`` times |log-ratio| more."""
    assert x.chosen is not None
    losses = -x.advantages * x.ratio + objective.cov_coef * x.chosen * _absolute(x.log_ratio)
    return losses, {"covariance/chosen_mean": x.chosen}


def _absolute(value: Tokens) -> Tokens:
    """|value| with a slope of 0 at 0, where jnp.abs has 1: in the first update all log-ratios are 0."""
    return value * jax.lax.stop_gradient(jnp.sign(value))
