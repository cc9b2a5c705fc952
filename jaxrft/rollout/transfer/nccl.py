"""To servers on other GPUs than the trainer's: NCCL broadcasts each bucket from one of the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxrft.rollout.server_side.jaxrft_cuda import Cuda, Nccl
from jaxrft.rollout.transfer.transport import check_fits, copy_on


class NcclBroadcast:
    """One group of the trainer, rank 0, and all workers of all servers, in order.

    No two members may share a GPU. ``connect`` and ``put`` wait for every worker, so they run beside the requests that
    tell the servers of them.

    Args:
        device: GPU that sends.
        slot_bytes: the largest bucket.
        workers: of each server.
        cuda: in place of the one that this process has.
        nccl: likewise.

    Raises:
        OSError: a library of CUDA, or NCCL, is missing.
        RuntimeError: NCCL refused.
    """

    name = "nccl"
    slots = 1
    put_first = False

    def __init__(
        self,
        device: jax.Device,
        slot_bytes: int,
        workers: Sequence[int],
        *,
        cuda: Cuda | None = None,
        nccl: Nccl | None = None,
    ):
        self._device, self._slot_bytes, self._workers = device, slot_bytes, tuple(workers)
        self._cuda, self._nccl = cuda or Cuda(), nccl or Nccl()
        self._identity = self._nccl.unique_id()
        self._communicator: int | None = None

    @property
    def _ranks(self) -> int:
        return 1 + sum(self._workers)

    def describe(self, server: int) -> dict[str, Any]:
        """Which ranks the server's workers take in which group."""
        return {
            "kind": self.name,
            "slot_bytes": self._slot_bytes,
            "id": self._identity.hex(),
            "ranks": self._ranks,
            "first_rank": 1 + sum(self._workers[:server]),
        }

    def connect(self) -> None:
        """Joins the group; waits until all workers do.

        Raises:
            RuntimeError: NCCL refused.
        """
        self._cuda.set_device(self._device.local_hardware_id)
        self._communicator = self._nccl.join(self._identity, self._ranks, 0)

    def opened(self) -> None:
        """Nothing: a group has no name."""

    def put(self, slot: int, packed: jax.Array) -> None:
        """Sends the bucket from where it lies; waits until it has gone.

        Raises:
            ValueError: the bucket does not fit or is not whole on the GPU that sends.
            RuntimeError: NCCL refused, or the group has not been joined.
        """
        check_fits(slot, packed, self.slots, self._slot_bytes)
        if self._communicator is None:
            raise RuntimeError("the transport is not connected")
        whole = copy_on(packed, self._device)
        self._cuda.set_device(self._device.local_hardware_id)
        self._nccl.broadcast(self._communicator, whole.unsafe_buffer_pointer(), whole.nbytes)
        self._cuda.synchronize()

    def close(self) -> None:
        """Leaves the group."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            self._cuda.set_device(self._device.local_hardware_id)
            self._nccl.leave(communicator)
