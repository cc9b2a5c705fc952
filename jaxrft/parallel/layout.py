"""Where everything lies: a mesh and a strategy, as values that the model's code asks while it is traced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxrft.parallel.mesh import replicated
from jaxrft.parallel.rules import RULES, mesh_axes, partition

# What each strategy shards over the mesh's axes ``fsdp`` and ``sequence`` (ZeRO: arXiv:1910.02054).
STRATEGIES: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"moments"}),
    "zero2": frozenset({"moments", "gradients"}),
    "zero3": frozenset({"moments", "gradients", "params"}),
    "fsdp": frozenset({"moments", "gradients", "params"}),
    "hsdp": frozenset({"moments", "gradients", "params"}),
}

# Part of the key of JAX's caches: a program traced under one layout is not taken for another.
_active = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what is sharded on it.

    Under :meth:`use`, code that is traced constrains its activations by it and gathers parameters for use.

    Attributes:
        mesh: of :func:`jaxrft.parallel.make_mesh`.
        strategy: ``ddp``, ``zero1``, ``zero2``, ``zero3`` (also called ``fsdp``) or ``hsdp`` (``zero3`` within each
            replica).
        decoding: whether rows are slots of a generating engine.

    Raises:
        ValueError: an unknown strategy.
    """

    mesh: Mesh
    strategy: str = "ddp"
    decoding: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {self.strategy!r}, takes {', '.join(STRATEGIES)}")

    def use(self) -> AbstractContextManager[Any]:
        """The context in which code is traced for this layout. On one device there is nothing to lay out."""
        return _active(self if self.mesh.size > 1 else None)

    def shards(self, kind: str) -> bool:
        """Whether ``params``, ``gradients`` or ``moments`` are sharded."""
        return kind in STRATEGIES[self.strategy]

    def parameter(self, kind: str, axes: Sequence[str | None], shape: Sequence[int], units=None) -> PartitionSpec:
        """How a parameter's value (``params``), gradient (``gradients``) or moment (``moments``) lies."""
        return partition(self.mesh, axes, shape, units=units, sharded=self.shards(kind))

    def gathered(self, axes: Sequence[str | None], shape: Sequence[int], units=None) -> PartitionSpec:
        """How a parameter lies while it is used: whole but for tensor parallelism."""
        return partition(self.mesh, axes, shape, units=units)

    def activation(self, axes: Sequence[str | None], shape: Sequence[int], units=None) -> PartitionSpec:
        """How an activation lies."""
        if self.decoding:
            axes = [{"batch": "slots", "time": None}.get(name or "", name) for name in axes]
        return partition(self.mesh, axes, shape, units=units)

    @property
    def slot_devices(self) -> int:
        """Devices that share out the completions which are generated at the same time."""
        return math.prod(self.mesh.shape.get(name, 1) for name in RULES["slots"])

    def named(self, spec: PartitionSpec) -> NamedSharding:
        """A spec on this mesh."""
        return NamedSharding(self.mesh, spec)

    def shardings(self, kind: str, tree: Any) -> Any:
        """Sharding of each parameter of a tree of ``nnx.Param``; of what is not one, a whole copy on every device.

        Args:
            kind: ``params``, ``gradients`` or ``moments``.
            tree: parameters as ``nnx.split`` gives them, or an optimizer's state over such.
        """

        def one(leaf: Any) -> NamedSharding:
            if not isinstance(leaf, nnx.Variable):
                return replicated(self.mesh)
            axes, units = logical_axes(leaf)
            return self.named(self.parameter(kind, axes, leaf.get_value().shape, units))

        return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def logical_axes(variable: nnx.Variable) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """Names of a parameter's axes, all None where it has none, and the blocks of each axis."""
    metadata = variable.get_metadata()
    shape = variable.get_value().shape
    return metadata.get("axes") or (None,) * len(shape), metadata.get("units") or shape


def current() -> Layout | None:
    """The layout that code is being traced for; None outside of any."""
    return _active.value


def constrain(x: Array, axes: Sequence[str | None], units: Sequence[int] | None = None) -> Array:
    """``x`` laid out as an activation with these axes; unchanged outside of a layout."""
    layout = current()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.named(layout.activation(axes, x.shape, units)))


def gather(parameter: Array, axes: Sequence[str | None], units: Sequence[int] | None = None) -> Array:
    """A parameter laid out for use; unchanged outside of a layout."""
    layout = current()
    if layout is None:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, layout.named(layout.gathered(axes, parameter.shape, units)))


def apart(parameter: Array, cotangent: Array) -> tuple[Array, Array]:
    """A sharded parameter that the backward pass gathers for itself, and the cotangent that it waits for.

    Without this the compiler finds that forward and backward pass gather the same, gathers once, and keeps the whole
    parameters of all layers in between. Both are unchanged where parameters are not sharded; and on a CPU, whose
    compiler drops the barrier late: it would gather twice, and keep both.
    """
    layout = current()
    if layout is None or not layout.shards("params") or jax.default_backend() == "cpu":
        return parameter, cotangent
    return jax.lax.optimization_barrier((parameter, cotangent))


def as_cast(parameter: Array) -> Array:
    """A sharded parameter, cast already, that is gathered in the type that it was cast to.

    Without this a GPU's compiler may gather it as it is kept, and cast what is used of it. Unchanged where parameters
    are not sharded, and on a CPU, whose compiler drops the barrier.
    """
    layout = current()
    if layout is None or not layout.shards("params") or jax.default_backend() == "cpu":
        return parameter
    return jax.lax.optimization_barrier(parameter)


def constrain_gradient(gradient: Array, axes: Sequence[str | None], units: Sequence[int] | None = None) -> Array:
    """A parameter's gradient laid out as the strategy says; unchanged outside of a layout."""
    layout = current()
    if layout is None:
        return gradient
    spec = layout.parameter("gradients", axes, gradient.shape, units)
    return jax.lax.with_sharding_constraint(gradient, layout.named(spec))


def sum_over(local: Array, spec: PartitionSpec, axes: Sequence[str]) -> Array:
    """Inside ``shard_map``: the sum over mesh axes, each device keeping the part of it that ``spec`` gives it."""
    rest = list(axes)
    for dimension, part in enumerate(spec):
        names = tuple(name for name in mesh_axes(PartitionSpec(part)) if name in rest)
        if names:
            local = jax.lax.psum_scatter(local, names, scatter_dimension=dimension, tiled=True)
            rest = [name for name in rest if name not in names]
    return jax.lax.psum(local, tuple(rest)) if rest else local
