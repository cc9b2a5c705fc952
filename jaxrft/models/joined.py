"""Kernels of layers that have the same input, side by side: one product in place of several.

For a generating engine's own copy of the weights. A GPU multiplies a few hundred tokens with three small kernels in
three times the time of one large one, since none of the small ones has work for all of its processors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.models.quantization import QuantizedKernel

Kernel = Array | QuantizedKernel

# Names of the layers in a module, in the order in which their outputs stand side by side.
GROUPS = (("query", "key", "value"), ("gate", "up"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedKernel:
    """Stands where the first layer's kernel does.

    Attributes:
        kernel: of all layers.
        widths: outputs of each.
    """

    kernel: Float[Array, "inputs outputs"] | QuantizedKernel
    widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        return self.kernel.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InJoined:
    """Stands where the kernels of the other layers do: nothing is there."""


def join(kernels: list[Kernel]) -> list[JoinedKernel | InJoined]:
    """What stands in the places of the layers' kernels once these are joined."""
    widths = tuple(kernel.shape[-1] for kernel in kernels)
    return [JoinedKernel(_side_by_side(kernels), widths), *(InJoined() for _ in kernels[1:])]


def _side_by_side(kernels: list[Any]) -> Kernel:
    if isinstance(kernels[0], QuantizedKernel):
        values, scales = ([getattr(kernel, name) for kernel in kernels] for name in ("values", "scale"))
        return QuantizedKernel(jnp.concatenate(values, axis=-1), jnp.concatenate(scales))
    return jnp.concatenate(kernels, axis=-1)


def groups_of(paths: list[tuple[str, ...]]) -> list[list[int]]:
    """Which of a model's parameters are kernels to be joined, group by group.

    Args:
        paths: of the parameters, such as ``("layers", "0", "mlp", "gate", "kernel")``.
    """
    places = {path: index for index, path in enumerate(paths)}
    return [
        [places[(*path[:-2], name, "kernel")] for name in names]
        for names in GROUPS
        for path in paths
        if path[-2:] == (names[0], "kernel")
    ]
