"""The native engine's own copy of the weights: cast, quantised or joined once for many tokens."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxrft.models.joined import InJoined, JoinedKernel, groups_of, join
from jaxrft.models.quantization import QuantizedKernel, quantize_param, takes_quantization

Leaf = Array | QuantizedKernel | JoinedKernel | InJoined


def own_copy(params: Any, dtype: Any, *, quantizes: bool, joins: bool = False) -> tuple[Leaf | None, ...]:
    """A model's state, leaf by leaf: matrices in ``dtype``, and where it ``quantizes``, kernels in 8 bits.

    None where a leaf is used as it is kept: a matrix that has the type, and vectors, as of norms.

    Args:
        joins: whether kernels with the same input are put side by side, see :mod:`jaxrft.models.joined`.
    """

    def own(param: nnx.Variable) -> Leaf | None:
        if quantizes and takes_quantization(param):
            return quantize_param(param)
        leaf = param.get_value()
        return leaf.astype(dtype) if leaf.ndim > 1 and leaf.dtype != dtype else None

    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    made = [own(param) for _, param in found]
    for places in groups_of([_names(path) for path, _ in found]) if joins else ():
        kernels: list[Any] = [found[i][1].get_value() if made[i] is None else made[i] for i in places]
        for place, kernel in zip(places, join(kernels), strict=True):
            made[place] = kernel
    return tuple(made)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
