"""A decoder's parameters as shapes alone: what is to be filled, planned or compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec


class _OneKey:
    """The same key each time, where no numbers are drawn.

    nnx.Rngs counts what it has given. While shapes are traced, each count makes flax ask the counter for its sharding,
    which it lacks, and JAX write out the whole trace for the error message: seconds for some dozens of layers.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract_decoder(spec: DecoderSpec, dtype: Any = jnp.float32) -> Decoder:
    """A decoder whose parameters are ``jax.ShapeDtypeStruct``, float32.

    Args:
        spec: its shape.
        dtype: type that activations are computed in.
    """
    return nnx.eval_shape(lambda: Decoder(spec, dtype=dtype, rngs=_OneKey()))  # type: ignore[arg-type]
