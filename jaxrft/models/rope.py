"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrft.models.spec import RopeSpec

# Cosine and signed sine of every token's angles.
RopeTables = tuple[Float[Array, "batch time head_dim"], Float[Array, "batch time head_dim"]]


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> np.ndarray:
    """Angular frequency of each pair of channels, float32 [head_dim / 2].

    Computed on the host once, in float32, in the order of operations that Hugging Face uses, so that
    angles at long positions agree to the last bit that float32 can hold.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(spec.theta), exponents)
    if spec.kind == "default":
        return frequencies
    if spec.kind == "linear":
        return (frequencies / np.float32(spec.factor)).astype(np.float32)
    if spec.kind == "llama3":
        return _llama3_frequencies(spec, frequencies)
    raise ValueError(f"rope kind: got {spec.kind!r}, takes default, linear or llama3")


def _llama3_frequencies(spec: RopeSpec, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths stretched by ``factor``, short ones kept, a ramp between."""
    wavelengths = 2 * math.pi / frequencies
    turns = spec.original_max_positions / wavelengths
    ramp = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    ramp = np.clip(ramp, 0.0, 1.0)
    return ((1 - ramp) * frequencies / spec.factor + ramp * frequencies).astype(np.float32)


def rope_tables(positions: Int[Array, "batch time"], spec: RopeSpec, head_dim: int) -> RopeTables:
    """Cosine and signed sine of every position, float32; made once a step and shared by all layers."""
    frequencies = jnp.asarray(inverse_frequencies(spec, head_dim))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rope(
    x: Float[Array, "batch time heads head_dim"],
    cos: Float[Array, "batch time head_dim"],
    signed_sin: Float[Array, "batch time head_dim"],
) -> Float[Array, "batch time heads head_dim"]:
    """Rotates the first half of each head's channels against the second half."""
    half = x.shape[-1] // 2
    swapped = jnp.concatenate([x[..., half:], x[..., :half]], -1)
    rotated = x.astype(jnp.float32) * cos[:, :, None] + swapped.astype(jnp.float32) * signed_sin[:, :, None]
    return rotated.astype(x.dtype)
