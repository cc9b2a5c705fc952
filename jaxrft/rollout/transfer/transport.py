"""What every way from the trainer to its servers has in common."""

from __future__ import annotations

from typing import Any, Protocol

import jax


class Transport(Protocol):
    """Takes buckets of bytes to the workers of all servers. A server's side is in ``server_side/jaxrft_memory.py``.

    Attributes:
        name: ``cuda_ipc``, ``nccl`` or ``shared_memory``.
        slots: buckets that may be under way at once.
        put_first: a bucket lies in its slot before the servers are told of it; otherwise it is sent while they wait
            for it.
    """

    name: str
    slots: int
    put_first: bool

    def describe(self, server: int) -> dict[str, Any]:
        """What the workers of one server open: fit for JSON, with ``kind`` (the name) and ``slot_bytes`` in it.

        Args:
            server: place of the server among all, from 0.
        """

    def connect(self) -> None:
        """Called while the servers open what was described."""

    def opened(self) -> None:
        """All servers have opened it."""

    def put(self, slot: int, packed: jax.Array) -> None:
        """Puts a bucket into its slot; returns when its bytes are there, or have been sent.

        Args:
            slot: from 0; the servers have read what lay in it before.
            packed: [elements] of any one type, whole on each of its devices.
        """

    def close(self) -> None:
        """Gives everything back, once the servers have let go of it. More calls do nothing."""


def copy_on(packed: jax.Array, device: jax.Device) -> jax.Array:
    """The whole of an array as it lies on one of its devices, without a copy; its values are there.

    Raises:
        ValueError: it does not lie there, or only a part of it does.
    """
    for shard in packed.addressable_shards:
        if shard.device == device:
            if shard.data.shape != packed.shape:
                raise ValueError(
                    f"a bucket must be whole on each device, {device} has {shard.data.shape} of {packed.shape}"
                )
            return shard.data.block_until_ready()
    raise ValueError(f"a bucket must lie on {device}, this one lies on {sorted(map(str, packed.devices()))}")


def check_fits(slot: int, packed: jax.Array, slots: int, slot_bytes: int) -> None:
    """Sees that a bucket may go into a slot.

    Raises:
        ValueError: it may not.
    """
    if not 0 <= slot < slots:
        raise ValueError(f"slot {slot} is not one of {slots}")
    if packed.ndim != 1:
        raise ValueError(f"a bucket must be flat, this one has shape {packed.shape}")
    if packed.nbytes > slot_bytes:
        raise ValueError(f"a bucket of {packed.nbytes} bytes does not fit into a slot of {slot_bytes}")
