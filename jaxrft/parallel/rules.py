"""From the logical names of an array's axes to axes of the mesh: the one table.

A parameter names its axes in its metadata: ``axes``, and where an axis consists of blocks that must not be cut,
such as heads, ``units``, the number of blocks of each axis. Activations are named where they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.sharding import Mesh, PartitionSpec

# Axes over which a strategy shards state. Devices that share a row's time steps share the state too.
SHARDING_AXES = ("fsdp", "sequence")

RULES: dict[str, tuple[str, ...]] = {
    # Of activations.
    "batch": ("replica", "fsdp"),
    "time": ("sequence",),
    # While tokens are generated a row has one time step, so that the sequence's devices take rows.
    "slots": ("replica", "fsdp", "sequence"),
    # Of activations and parameters.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # The model's width: whole in activations; in parameters where a strategy shards state.
    "embed": (),
    # Vectors of norms, and a head's single output: too small to be worth a message.
    "norm": (),
    "head_dim": (),
    "value": (),
}


def partition(
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    *,
    units: Sequence[int] | None = None,
    sharded: bool = False,
) -> PartitionSpec:
    """How an array lies on the mesh. An axis whose size the devices do not divide stays whole.

    Args:
        mesh: of :func:`jaxrft.parallel.make_mesh`.
        axes: logical name of each axis; None is never cut.
        shape: size of each axis.
        units: blocks of each axis that must stay whole; None: the elements.
        sharded: cut the width, ``embed``, over the axes of the mesh that shard state as well; where that is not
            possible, another axis of a matrix.

    Raises:
        ValueError: a name that the table lacks.
    """
    unknown = [name for name in axes if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"axes: got {unknown[0]!r}, takes {', '.join(RULES)}")
    blocks = list(shape if units is None else units)
    parts = [_fitting(mesh, RULES[name] if name else (), size) for name, size in zip(axes, blocks)]
    if sharded and any(axes):
        _shard(mesh, parts, axes, blocks)
    return PartitionSpec(*[part[0] if len(part) == 1 else part or None for part in parts])


def _shard(mesh: Mesh, parts: list[tuple[str, ...]], axes: Sequence[str | None], blocks: Sequence[int]) -> None:
    """Adds the axes that shard state to one axis of the array: its width, else the first that divides."""
    order = sorted(range(len(axes)), key=lambda i: axes[i] != "embed")
    if len(axes) == 1 and axes[0] != "embed":
        return
    for index in order:
        wanted = (*parts[index], *SHARDING_AXES)
        fitting = _fitting(mesh, wanted, blocks[index])
        if len(fitting) > len(parts[index]):
            parts[index] = fitting
            return


def _fitting(mesh: Mesh, names: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Those of the mesh's axes, of more than one device, if together they divide ``size``; else none."""
    used = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return used if size % math.prod(mesh.shape[name] for name in used) == 0 else ()


def mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """All axes of the mesh that a spec cuts over."""
    return tuple(name for part in spec if part is not None for name in ((part,) if isinstance(part, str) else part))
