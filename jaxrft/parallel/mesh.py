"""The device mesh: made in this one place."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(replica: int = 1) -> Mesh:
    """A mesh whose axis ``replica`` holds copies of the model, each taking a share of the batch.

    Args:
        replica: number of devices.

    Raises:
        ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if replica > len(devices):
        raise ValueError(
            f"parallel.replica: got {replica}, but JAX sees {len(devices)} {devices[0].platform} device(s)"
        )
    # Axes in Auto mode: the compiler propagates shardings, where make_mesh's default wants them explicit.
    return Mesh(np.asarray(devices[:replica]), ("replica",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array whose ``axis`` is split over the replicas."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "replica"))
