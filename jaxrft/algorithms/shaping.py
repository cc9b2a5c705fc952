"""What is done to rewards before they become advantages, and the state that this keeps."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.choices import require_choice, require_range

Samples = Float[Array, "samples"]
RunningNorm = Literal["none", "scale", "standardize"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardShaping:
    """What is done to rewards before advantages are made of them, each once, in the order of these fields.

    Attributes:
        overlong_buffer: share of the longest response allowed, at its end, that is punished; 0: no punishment.
        overlong_factor: punishment of a response of full length; see :func:`overlong_penalty`.
        length_penalty: see :func:`length_penalty`; 0: none.
        running_norm: divide rewards by the standard deviation of all that the run has seen (``scale``), and subtract
            their mean before (``standardize``); ``none``.
        reward_clip: rewards are clipped to +- this; None: as they are.

    Raises:
        ValueError: a name that is not known, or a number out of range.
    """

    overlong_buffer: float = 0.0
    overlong_factor: float = 1.0
    length_penalty: float = 0.0
    running_norm: RunningNorm = "none"
    reward_clip: float | None = None

    def __post_init__(self) -> None:
        require_choice("running_norm", self.running_norm, get_args(RunningNorm))
        require_range("overlong_buffer", self.overlong_buffer, 0, 1)
        for field in ("overlong_factor", "length_penalty", "reward_clip"):
            require_range(field, getattr(self, field), 0)
        if self.overlong_buffer == 0 and self.overlong_factor != 1.0:
            raise ValueError("overlong_factor: set without overlong_buffer, of which it is the factor; remove it")


def overlong_penalty(lengths: Samples, max_length: int, buffer: float, factor: float = 1.0) -> Samples:
    """DAPO's soft overlong punishment (arXiv:2503.14476), to be added to rewards: from 0 down to ``-factor``.

    Args:
        lengths: tokens of each response.
        max_length: the longest response allowed.
        buffer: the last so many of these are punished, linearly.
        factor: punishment at ``max_length``.

    Raises:
        ValueError: ``buffer`` is not above 0.
    """
    if not buffer > 0:
        raise ValueError(f"buffer: got {buffer!r}, takes a number of tokens above 0")
    exceeded = (jnp.asarray(lengths, jnp.float32) - (max_length - buffer)) / buffer
    return jnp.minimum(-factor * exceeded, 0.0)


def length_penalty(lengths: Samples, max_length: int, coef: float) -> Samples:
    """``-coef`` times the share of the longest response allowed that a response takes; to be added to rewards."""
    return -coef * jnp.asarray(lengths, jnp.float32) / max_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean, and sum of squared deviations of all values seen."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    m2: Float[Array, ""]


def moments(values: Samples) -> Moments:
    """Those of an array; NaN counts nowhere."""
    values = jnp.asarray(values, jnp.float32)
    valid = ~jnp.isnan(values)
    count = jnp.sum(valid).astype(jnp.float32)
    # Measured from the lowest: equal values then have no spread at all, where their mean would round.
    lowest = jnp.min(jnp.where(valid, values, jnp.inf), initial=jnp.inf)
    above = jnp.where(valid, values - lowest, 0.0)
    mean = jnp.sum(above) / jnp.maximum(count, 1.0)
    squares = jnp.where(valid, jnp.square(above - mean), 0.0)
    return Moments(count, jnp.where(count > 0, lowest + mean, 0.0), jnp.sum(squares))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Those of two sets of values together, in whatever order and however they were split (Chan et al. 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    difference = b.mean - a.mean
    return Moments(count, a.mean + difference * share, a.m2 + b.m2 + jnp.square(difference) * a.count * share)


def no_moments() -> Moments:
    """Those of no values."""
    zero = jnp.zeros((), jnp.float32)
    return Moments(zero, zero, zero)


def standardize(values: Samples, seen: Moments, shift_mean: bool = True, eps: float = 1e-8) -> Samples:
    """Values over the standard deviation (n - 1) of what was seen, plus ``eps``; 1 where that is 0 or not known.

    Args:
        shift_mean: subtract the mean of what was seen too.
    """
    known = (seen.count > 1) & (seen.m2 > 0)
    deviation = jnp.sqrt(jnp.where(known, seen.m2, 1.0) / jnp.maximum(seen.count - 1.0, 1.0)) + eps
    return (values - (seen.mean if shift_mean else 0.0)) / jnp.where(known, deviation, 1.0)


def adaptive_kl_coef(coef: float, observed: float, target: float, horizon: float, count: int) -> float:
    """The KL's weight after ``count`` samples with an ``observed`` KL (arXiv:1909.08593).

    It grows where the KL is above its target and shrinks below, by at most a fifth in ``horizon`` samples.
    """
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * count / horizon)


def length_terms(shaping: RewardShaping, lengths: Samples, max_length: int) -> Samples:
    """What the length of each response adds to its reward."""
    terms = jnp.zeros(jnp.shape(lengths), jnp.float32)
    if shaping.overlong_buffer > 0:
        terms += overlong_penalty(lengths, max_length, shaping.overlong_buffer * max_length, shaping.overlong_factor)
    if shaping.length_penalty:
        terms += length_penalty(lengths, max_length, shaping.length_penalty)
    return terms


def shape_rewards(
    shaping: RewardShaping, rewards: Samples, lengths: Samples, max_length: int, seen: Moments, update: bool = True
) -> tuple[Samples, Moments]:
    """Rewards as advantages are made of them.

    Args:
        shaping: what is done, in the order of its fields.
        rewards: one a sample; NaN where none applies, and stays.
        lengths: tokens of each response.
        max_length: the longest response allowed.
        seen: moments of all rewards before these; with several processes, of all of them.
        update: count these rewards among those seen, before they are measured by them.

    Returns:
        Rewards, and the moments of all that was seen.
    """
    rewards = jnp.asarray(rewards, jnp.float32) + length_terms(shaping, lengths, max_length)
    if shaping.running_norm != "none":
        seen = merge_moments(seen, moments(rewards)) if update else seen
        rewards = standardize(rewards, seen, shift_mean=shaping.running_norm == "standardize")
    if shaping.reward_clip is not None:
        rewards = jnp.clip(rewards, -shaping.reward_clip, shaping.reward_clip)
    return rewards, seen
