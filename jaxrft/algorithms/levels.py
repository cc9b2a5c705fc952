"""The levels of the importance ratio: of a token, or of a whole response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Level = Literal["token", "sequence"]


def _token(log_ratio: Float[Array, "batch time"], mask: Float[Array, "batch time"]) -> Float[Array, "batch time"]:
    return log_ratio


def _sequence(log_ratio: Float[Array, "batch time"], mask: Float[Array, "batch time"]) -> Float[Array, "batch time"]:
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    mean = jnp.sum(log_ratio * mask, axis=-1, keepdims=True) / lengths
    return jnp.broadcast_to(mean, log_ratio.shape)


LEVELS: dict[Level, Callable[[Float[Array, "batch time"], Float[Array, "batch time"]], Float[Array, "batch time"]]] = {
    "token": _token,
    "sequence": _sequence,
}
"""What ``PolicyObjective.level`` names: functions of the tokens' log-ratios, 0 where masked, and of the mask."""
