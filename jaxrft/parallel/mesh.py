"""The device mesh: made in this one place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first: neighbours in the innermost axis talk most (twice a layer), and stand closest to each other.
MESH_AXES = ("replica", "fsdp", "sequence", "tensor")


def make_mesh(
    replica: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run; it always has all four axes, of one device where they are not used.

    Args:
        replica: groups of devices with whole copies of all state; each takes a share of the batch.
        fsdp: devices that take a share of the batch, and among which a strategy shards state.
        sequence: devices that take a share of each row's time steps.
        tensor: devices that take a share of each layer's heads and channels, and of the vocabulary.
        devices: None takes JAX's, the first ones.

    Raises:
        ValueError: there are fewer devices.
    """
    sizes = {"replica": replica, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    wanted = math.prod(sizes.values())
    devices = jax.devices() if devices is None else devices
    if wanted > len(devices):
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        first = next((name for name in reversed(MESH_AXES) if sizes[name] > 1), "replica")
        raise ValueError(
            f"parallel.{first}: {named} takes {wanted} devices, but JAX sees {len(devices)} "
            f"{devices[0].platform} device(s)"
        )
    # Axes in Auto mode: the compiler propagates shardings, where make_mesh's default wants them explicit.
    shape = tuple(sizes[name] for name in MESH_AXES)
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())
