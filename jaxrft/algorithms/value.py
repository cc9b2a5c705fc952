"""The loss of a critic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.axes import AxisName, axis_sum, loss_sum
from jaxrft.algorithms.reductions import Reduction, Totals, token_weights, totals

Tokens = Float[Array, "batch time"]


def value_loss(
    values: Tokens,
    old_values: Tokens,
    returns: Tokens,
    mask: Tokens,
    clip: float | None = 0.2,
    axis_name: AxisName | None = None,
    *,
    reduction: Reduction = "token_mean",
    constant_length: int | None = None,
    whole: Totals | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Half the squared error of values, clipped around their old ones as PPO's reference code does (arXiv:1707.06347).

    Of (v - R)^2 and (c - R)^2, with c the value clipped to within ``clip`` of the old one, the larger counts: a value
    that has moved too far towards its return has no gradient.

    Args:
        values: the critic's; gradients flow through these alone.
        old_values: before the first update on these samples.
        returns: what the values should be.
        mask: 1 for tokens that count; elsewhere the arrays may hold anything.
        clip: None: the plain squared error.
        axis_name, reduction, constant_length, whole: as for the policy's loss.

    Returns:
        The loss, and statistics: the mean value, return and squared error, and the share of clipped tokens.

    Raises:
        ValueError: shapes differ, or ``clip`` is negative.
    """
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip: got {clip!r}, takes at least 0 or None")
    mask = mask.astype(jnp.float32)
    for name, array in (("values", values), ("old_values", old_values), ("returns", returns)):
        if array.shape != mask.shape:
            raise ValueError(f"{name}: got shape {array.shape}, takes {mask.shape}, as the mask has")
    values, old_values, returns = (jnp.where(mask > 0, array, 0.0) for array in (values, old_values, returns))
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    errors, clipped = jnp.square(values - returns), jnp.zeros_like(mask)
    if clip is not None:
        bounded = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns)
        clipped = (bounded > errors).astype(jnp.float32)
        errors = jnp.where(clipped > 0, bounded, errors)
    if whole is None:
        whole = totals(mask, axis_name)
    loss = loss_sum(jnp.sum(0.5 * errors * token_weights(mask, reduction, whole, constant_length)), axis_name)
    share = mask / jnp.maximum(whole.tokens, 1.0)
    tokens = {
        "value/mean": values,
        "value/return_mean": returns,
        "value/clipped_mean": clipped,
        "value/error_mean": jnp.square(values - returns),
    }
    return loss, {k: axis_sum(jnp.sum(jax.lax.stop_gradient(v) * share), axis_name) for k, v in tokens.items()}
