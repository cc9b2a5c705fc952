"""Returns and advantages of single tokens, from token rewards and a critic's values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tokens = Float[Array, "batch time"]


def token_returns(token_rewards: Tokens, mask: Tokens, gamma: float = 1.0) -> Tokens:
    """What is still to come at each token: the sum of its reward and all later ones, discounted.

    Masked tokens (those of a tool, say) have no reward, take no time, and get 0.

    Args:
        token_rewards: anything where masked.
        mask: 1 for tokens of the response.
        gamma: discount of one token.
    """
    mask = mask.astype(jnp.float32)
    rewards = jnp.where(mask > 0, token_rewards, 0.0)
    if isinstance(gamma, (int, float)) and gamma == 1:
        # Without a discount no loop over tokens, which takes as many turns as a response may have tokens.
        return jax.lax.cumsum(rewards, axis=1, reverse=True) * mask

    def back(later: Float[Array, "batch"], now: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, valid = now
        total = jnp.where(valid > 0, reward + gamma * later, later)
        return total, total

    _, totals = jax.lax.scan(back, jnp.zeros(mask.shape[0]), (rewards.T, mask.T), reverse=True)
    return totals.T * mask


def gae(
    token_rewards: Tokens,
    values: Tokens,
    mask: Tokens,
    gamma: float = 1.0,
    lam: float | Float[Array, "batch"] = 0.95,
) -> tuple[Tokens, Tokens]:
    """Generalised advantage estimation (arXiv:1506.02438).

    The value after the last token is 0. Across masked tokens the state is carried: the token before a hole is
    followed by the token behind it.

    Args:
        token_rewards: anything where masked.
        values: the critic's, before each token; anything where masked.
        mask: 1 for tokens of the response.
        gamma: discount of one token.
        lam: 1 for returns less values, 0 for one-step errors; or one for each row, see
            :func:`length_adaptive_lambda`.

    Returns:
        Advantages and returns (advantages + values); 0 where masked.

    Raises:
        ValueError: shapes differ.
    """
    for name, array in (("token_rewards", token_rewards), ("values", values)):
        if array.shape != mask.shape:
            raise ValueError(f"{name}: got shape {array.shape}, takes {mask.shape}, as the mask has")
    mask = mask.astype(jnp.float32)
    rewards, values = (jnp.where(mask > 0, array, 0.0) for array in (token_rewards, values))

    def back(carry: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage, next_value = carry
        reward, value, valid = now
        found = reward + gamma * next_value - value + gamma * lam * advantage
        kept = jnp.where(valid > 0, found, advantage), jnp.where(valid > 0, value, next_value)
        return kept, kept[0]

    zero = jnp.zeros(mask.shape[0])
    _, advantages = jax.lax.scan(back, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T * mask
    return advantages, advantages + values


def length_adaptive_lambda(lengths: Float[Array, "batch"], alpha: float = 0.05) -> Float[Array, "batch"]:
    """1 - 1 / (alpha length), not below 0: long responses are credited over more tokens (VAPO, arXiv:2504.05118)."""
    return jnp.clip(1.0 - 1.0 / jnp.maximum(alpha * lengths, 1e-6), 0.0, 1.0)


def whiten(values: Tokens, mask: Tokens, shift_mean: bool = True, eps: float = 1e-8) -> Tokens:
    """Values at mean 0 and variance 1 over the valid tokens of the batch; 0 where masked.

    Args:
        values: anything where masked.
        mask: 1 for tokens that count.
        shift_mean: False leaves the mean where it was.
        eps: added to the variance (n - 1), which is 0 for one token alone.
    """
    mask = mask.astype(jnp.float32)
    count = jnp.sum(mask)
    # Measured from the lowest: equal values are then exactly their mean, and nothing is made of rounding.
    lowest = jnp.min(jnp.where(mask > 0, values, jnp.inf), initial=jnp.inf)
    above = jnp.where(mask > 0, values - lowest, 0.0)
    mean_above = jnp.sum(above) / jnp.maximum(count, 1.0)
    centred = (above - mean_above) * mask
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1.0, 1.0)
    whitened = centred * jax.lax.rsqrt(variance + eps)
    return whitened if shift_mean else jnp.where(mask > 0, whitened + lowest + mean_above, 0.0)
