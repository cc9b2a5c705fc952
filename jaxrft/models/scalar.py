"""A number for each token or row, from a decoder's hidden states: value networks and reward models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrft.models.decoder import Decoder
from jaxrft.models.layers import Linear
from jaxrft.models.spec import DecoderSpec


class ScalarModel(nnx.Module):
    """A decoder with one output in place of the vocabulary.

    Args:
        spec: of the decoder; its output projection is left out.
        dtype: type that activations are computed in.
        rngs: keys for new parameters.

    Attributes:
        decoder: whose ``remat`` and ``scan_layers`` hold here too.
    """

    def __init__(self, spec: DecoderSpec, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        # Tied embeddings have no projection of their own.
        self.decoder = Decoder(dataclasses.replace(spec, tie_embeddings=True), dtype=dtype, rngs=rngs)
        self.head = Linear(spec.hidden_size, 1, ("embed", "value"), bias=False, stddev=spec.init_stddev, rngs=rngs)

    def values(
        self,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"] | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time"]:
        """The number of each token, float32; of what stands behind a row's length it means nothing."""
        hidden = self.decoder.hidden(tokens, lengths, segment_ids=segment_ids)
        return self.head(hidden)[..., 0].astype(jnp.float32)

    def scores(self, tokens: Int[Array, "batch time"], lengths: Int[Array, "batch"]) -> Float[Array, "batch"]:
        """The number of each right-padded row: that of its last valid token, float32."""
        values = self.values(tokens, lengths)
        return jnp.take_along_axis(values, (lengths - 1)[:, None], axis=1)[:, 0]
