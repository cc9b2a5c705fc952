"""Where a model's state lies on a mesh, and what it takes there: of shapes alone, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrft.parallel.layout import Layout, logical_axes
from jaxrft.parallel.rules import SHARDING_AXES, mesh_axes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Place:
    """One parameter, its gradient and its optimizer moments.

    Attributes:
        name: path in the module.
        shape, dtype: of the parameter.
        axes: logical names of its axes.
        params, gradients, moments: how each lies on the mesh.
        param_bytes, gradient_bytes, moment_bytes: on each device; gradients and moments are float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    params: PartitionSpec
    gradients: PartitionSpec
    moments: PartitionSpec
    param_bytes: int
    gradient_bytes: int
    moment_bytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What :func:`describe` found; printed as a table."""

    layout: Layout
    places: tuple[Place, ...]

    @property
    def param_bytes(self) -> int:
        """Of all parameters, on each device."""
        return sum(place.param_bytes for place in self.places)

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, on each device."""
        return sum(place.gradient_bytes for place in self.places)

    @property
    def moment_bytes(self) -> int:
        """Of all optimizer moments, on each device."""
        return sum(place.moment_bytes for place in self.places)

    @property
    def whole(self) -> list[str]:
        """Matrices that lie whole on every device which shards parameters, because no axis of theirs divides."""
        if not self.layout.shards("params") or all(self.layout.mesh.shape[axis] == 1 for axis in SHARDING_AXES):
            return []
        return [p.name for p in self.places if len(p.shape) > 1 and not _cut(p.params)]

    def __str__(self) -> str:
        mesh = " x ".join(f"{name} {size}" for name, size in self.layout.mesh.shape.items())
        head = ("parameter", "shape", "axes", "parameter on", "gradient on", "moments on", "MiB a device")
        rows = [head, *(self._row(place) for place in self.places)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        total = self.param_bytes + self.gradient_bytes + self.moment_bytes
        return "\n".join(
            [
                f"{self.layout.strategy} on {self.layout.mesh.size} devices: {mesh}",
                *lines,
                f"each device holds {self.param_bytes / GIB:.3f} GiB of parameters, {self.gradient_bytes / GIB:.3f} of "
                f"gradients, {self.moment_bytes / GIB:.3f} of moments: {total / GIB:.3f} GiB",
                *(f"whole on every device, since no axis divides: {name}" for name in self.whole),
            ]
        )

    @staticmethod
    def _row(place: Place) -> tuple[str, ...]:
        size = (place.param_bytes + place.gradient_bytes + place.moment_bytes) / 2**20
        specs = (place.params, place.gradients, place.moments)
        axes = ", ".join(axis or "-" for axis in place.axes)
        shape = " x ".join(str(n) for n in place.shape)
        return (place.name, f"{shape} {jnp.dtype(place.dtype).name}", axes, *map(_text, specs), f"{size:.3f}")


def describe(params: Any, layout: Layout, opt_state: Any = None) -> Description:
    """Where every parameter, gradient and optimizer moment lies.

    Args:
        params: a model's state as ``nnx.split`` gives it, or a module; arrays may be abstract
            (``nnx.eval_shape``).
        layout: mesh and strategy.
        opt_state: the optimizer's; None counts AdamW's two moments a parameter.
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)
    kept = 2
    if opt_state is not None:
        kept = sum(map(_is_variable, jax.tree.leaves(opt_state, is_leaf=_is_variable))) // len(found)
    return Description(layout, tuple(_place(path, variable, layout, kept) for path, variable in found))


def _place(path: Any, variable: nnx.Variable, layout: Layout, kept: int) -> Place:
    axes, units = logical_axes(variable)
    value = variable.get_value()
    specs = {kind: layout.parameter(kind, axes, value.shape, units) for kind in ("params", "gradients", "moments")}
    held = {kind: math.prod(layout.named(spec).shard_shape(value.shape)) for kind, spec in specs.items()}
    return Place(
        name=jax.tree_util.keystr(path, simple=True, separator="."),
        shape=value.shape,
        dtype=value.dtype,
        axes=axes,
        **specs,
        param_bytes=held["params"] * jnp.dtype(value.dtype).itemsize,
        gradient_bytes=held["gradients"] * 4,
        moment_bytes=held["moments"] * 4 * kept,
    )


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _cut(spec: PartitionSpec) -> bool:
    return bool(set(mesh_axes(spec)) & set(SHARDING_AXES))


def _text(spec: PartitionSpec) -> str:
    names = [part if part is None or isinstance(part, str) else "+".join(part) for part in spec]
    return ", ".join(name or "-" for name in names) if any(names) else "whole"
