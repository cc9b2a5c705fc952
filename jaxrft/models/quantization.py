"""Kernels in 8-bit floating point, for programs that read weights far more often than they change.

Weights alone are quantised, to float8 e4m3 (arXiv:2209.05433) with one scale for each output channel. Activations,
sums and all other parameters keep their types, and the scale is applied to the product, so that the conversion of the
kernel is the only thing that stands between memory and the matrix units.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxrft import parallel

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel that is ``values * scale``; stands where a linear layer's kernel does.

    Attributes:
        values: float8_e4m3fn.
        scale: float32, one for each output channel.
    """

    values: Float[Array, "inputs outputs"]
    scale: Float[Array, "outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape


def quantize(kernel: Float[Array, "inputs outputs"]) -> QuantizedKernel:
    """The nearest values of 8 bits, scaled so that the largest of each output channel is the largest there is."""
    kernel = kernel.astype(jnp.float32)
    # A channel of zeros stays one.
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=0) / LARGEST, jnp.finfo(jnp.float32).tiny)
    # What lies above the largest value would become NaN, not that value.
    return QuantizedKernel(jnp.clip(kernel / scale, -LARGEST, LARGEST).astype(DTYPE), scale)


def takes_quantization(param: nnx.Variable) -> bool:
    """Whether a parameter is a linear layer's kernel: a matrix, but neither the embedding nor the output projection.

    These two weigh most in the probabilities of tokens, and of a large model they are a small part.
    """
    axes, _ = parallel.logical_axes(param)
    return len(axes) == 2 and None not in axes and "vocab" not in axes


def quantize_param(param: nnx.Variable) -> QuantizedKernel:
    """A parameter's kernel quantised, and laid out for use."""
    axes, units = parallel.logical_axes(param)
    kernel = quantize(parallel.gather(param.get_value(), axes, units))
    return QuantizedKernel(
        parallel.gather(kernel.values, axes, units), parallel.gather(kernel.scale, axes[1:], units[1:])
    )
