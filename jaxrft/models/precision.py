"""How exact a matrix product is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """Precision of products of operands of this type.

    float32 is float32: by default a GPU would round its operands to TF32's ten bits, and sampler and trainer,
    whose products have other shapes, would disagree by a thousand times more than they need to.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
