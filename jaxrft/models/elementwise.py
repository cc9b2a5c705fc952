"""Functions of a layer whose backward pass needs only their inputs.

Differentiated by JAX, each would keep several intermediate arrays of its input's size from the forward to the
backward pass: together more than the layer's matrix products keep.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """``silu(gate) * up`` (arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, d_out):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... size"], scale: Float[Array, "size"], eps: float) -> Float[Array, "... size"]:
    """``x`` over its root mean square along the last axis, in float32, times ``scale``; in the type of ``x``."""
    return (_normed(x, eps)[0].astype(x.dtype) * scale).astype(x.dtype)


def _normed(x, eps):
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return x * inverse, inverse


def _rms_norm_forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps, residuals, d_out):
    x, scale = residuals
    normed, inverse = _normed(x, eps)
    d_out = d_out.astype(jnp.float32)
    d_scale = jnp.sum(d_out * normed, axis=tuple(range(x.ndim - 1)))
    d_normed = d_out * scale
    d_x = inverse * (d_normed - normed * jnp.mean(d_normed * normed, -1, keepdims=True))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
