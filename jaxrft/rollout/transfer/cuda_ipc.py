"""To servers on the trainer's own GPUs: they read memory that the trainer shares with them (CUDA IPC)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxrft.rollout.server_side.jaxrft_cuda import Cuda
from jaxrft.rollout.transfer.transport import check_fits, copy_on

# As cudaMalloc aligns, so that a slot starts as well aligned as its slab.
ALIGNMENT = 256
# Smaller allocations share a block with others, which an exported handle would show too.
BLOCK = 2 << 20


class Slab(NamedTuple):
    """Shared memory on one GPU.

    Attributes:
        device: as JAX knows it.
        uuid: as every process knows it.
        pointer: address of slot 0.
        handle: opens it in another process; 64 bytes.
    """

    device: jax.Device
    uuid: str
    pointer: int
    handle: bytes


class CudaIpc:
    """A slab of slots on each GPU, apart from JAX's own memory, which need not be fit for sharing.

    Servers must let go of the slabs before ``close``.

    Args:
        devices: the servers' workers run on these GPUs; they count once each.
        slot_bytes: the largest bucket; rounded up to 256.
        slots: buckets that may be under way at once.
        cuda: in place of the one that this process has.

    Raises:
        OSError: a library of CUDA is missing.
        RuntimeError: CUDA refused, for lack of memory for instance.
    """

    name = "cuda_ipc"
    put_first = True

    def __init__(self, devices: Sequence[jax.Device], slot_bytes: int, slots: int = 2, *, cuda: Cuda | None = None):
        self.slots, self._slot_bytes = slots, _round_up(slot_bytes, ALIGNMENT)
        self._cuda = cuda or Cuda()
        with contextlib.ExitStack() as stack:
            self._slabs = [self._slab(device, stack) for device in dict.fromkeys(devices)]
            self._held = stack.pop_all()

    def _slab(self, device: jax.Device, stack: contextlib.ExitStack) -> Slab:
        ordinal = device.local_hardware_id
        self._cuda.set_device(ordinal)
        pointer = self._cuda.allocate(_round_up(self.slots * self._slot_bytes, BLOCK))
        stack.callback(self._free, ordinal, pointer)
        return Slab(device, self._cuda.uuid(ordinal), pointer, self._cuda.export_handle(pointer))

    def _free(self, ordinal: int, pointer: int) -> None:
        self._cuda.set_device(ordinal)
        self._cuda.free(pointer)

    def describe(self, server: int) -> dict[str, Any]:
        """The same for all servers: a worker picks the handle of its own GPU."""
        handles = {slab.uuid: slab.handle.hex() for slab in self._slabs}
        return {"kind": self.name, "slot_bytes": self._slot_bytes, "handles": handles}

    def connect(self) -> None:
        """Nothing: the servers find the slabs by themselves."""

    def opened(self) -> None:
        """Nothing: the slabs have no names."""

    def put(self, slot: int, packed: jax.Array) -> None:
        """Copies the bucket into its slot on every GPU.

        Raises:
            ValueError: the bucket does not fit or is not whole on every GPU.
            RuntimeError: CUDA refused, or the transport was closed.
        """
        check_fits(slot, packed, self.slots, self._slot_bytes)
        if not self._slabs:
            raise RuntimeError("the transport is closed")
        for slab in self._slabs:
            whole = copy_on(packed, slab.device)
            self._cuda.set_device(slab.device.local_hardware_id)
            self._cuda.copy(slab.pointer + slot * self._slot_bytes, whole.unsafe_buffer_pointer(), whole.nbytes)

    def close(self) -> None:
        """Frees the slabs."""
        self._slabs = []
        self._held.close()


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
