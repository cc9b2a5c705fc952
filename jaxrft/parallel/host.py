"""Arrays in the host's memory, from where a device reads them without a copy in between."""

from __future__ import annotations

from typing import Any

import jax

HOST_MEMORY = "pinned_host"


def host_shardings(shardings: Any) -> Any:
    """The same placements in the memory of the devices' hosts."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), shardings)


def to_host(tree: Any) -> Any:
    """Copies of arrays in the host's memory, each shard at the host of its device."""
    return jax.device_put(tree, jax.tree.map(lambda a: a.sharding.with_memory_kind(HOST_MEMORY), tree))


def to_device(tree: Any) -> Any:
    """Copies of arrays in their devices' own memory; those that are there already stay."""
    return jax.device_put(tree, jax.memory.Space.Device)
