"""The native engine's own copy of the weights: cast or quantised once for many tokens."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxrft.models.quantization import QuantizedKernel, quantize_param, takes_quantization

Leaf = Array | QuantizedKernel


def own_copy(params: Any, dtype: Any, *, quantizes: bool) -> tuple[Leaf | None, ...]:
    """A model's state, leaf by leaf: matrices in ``dtype``, and where it ``quantizes``, kernels in 8 bits.

    None where a leaf is used as it is kept: a matrix that has the type, and vectors, as of norms.
    """

    def own(param: nnx.Variable) -> Leaf | None:
        if quantizes and takes_quantization(param):
            return quantize_param(param)
        leaf = param.get_value()
        return leaf.astype(dtype) if leaf.ndim > 1 and leaf.dtype != dtype else None

    return tuple(own(param) for param in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
