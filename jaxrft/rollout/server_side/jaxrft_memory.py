"""The receiving end of each transport: bytes of a bucket as a torch tensor, without a copy where there can be none."""

from __future__ import annotations

import mmap
import os
from typing import Any


def open_memory(description: dict[str, Any], device: Any, rank: int) -> Any:
    """What ``description["kind"]`` names, opened.

    Args:
        description: as the trainer's transport describes itself.
        device: torch device of this worker.
        rank: of this worker in its server.
    """
    kind = description["kind"]
    if kind == "shared_memory":
        return SharedMemory(description)
    if kind == "cuda_ipc":
        return DeviceMemory(description, device)
    if kind == "nccl":
        return Broadcast(description, device, rank)
    raise ValueError(f"transport {kind!r} is not known here")


class SharedMemory:
    """Slots in a file of ``/dev/shm``."""

    def __init__(self, description: dict[str, Any]):
        self._slot_bytes = description["slot_bytes"]
        self._map: mmap.mmap | None
        handle = os.open(description["path"], os.O_RDONLY)
        try:
            self._map = mmap.mmap(handle, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        finally:
            os.close(handle)

    def read(self, slot: int, size: int) -> Any:
        """uint8 [size]; it changes with the next bucket of this slot."""
        import warnings

        import torch

        with warnings.catch_warnings():
            # torch warns of memory that cannot be written to; nothing writes to it.
            warnings.simplefilter("ignore")
            assert self._map is not None
            return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=slot * self._slot_bytes)

    def close(self) -> None:
        """Lets go of the file; its memory lives on while tensors refer to it."""
        # Not closed: tensors may refer to it, and it goes with the last of them.
        self._map = None


class DeviceMemory:
    """Slots in memory of the trainer on this worker's own GPU."""

    def __init__(self, description: dict[str, Any], device: Any):
        import torch
        from jaxrft_cuda import Cuda

        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handles = description["handles"]
        if uuid not in handles:
            raise ValueError(f"the trainer has no memory on GPU {uuid}, only on {', '.join(handles)}")
        self._device, self._slot_bytes = device, description["slot_bytes"]
        torch.cuda.set_device(device)
        self._cuda = Cuda()
        self._pointer = self._cuda.open_handle(bytes.fromhex(handles[uuid]))

    def read(self, slot: int, size: int) -> Any:
        """uint8 [size] on the GPU; it changes with the next bucket of this slot."""
        import torch

        return torch.as_tensor(_Pointer(self._pointer + slot * self._slot_bytes, size), device=self._device)

    def close(self) -> None:
        """Lets go of the trainer's memory."""
        self._cuda.close_handle(self._pointer)


class Broadcast:
    """A buffer that the trainer's broadcasts fill."""

    def __init__(self, description: dict[str, Any], device: Any, rank: int):
        import torch
        from jaxrft_cuda import Nccl

        torch.cuda.set_device(device)
        self._buffer = torch.empty(description["slot_bytes"], dtype=torch.uint8, device=device)
        # The trainer is rank 0; servers follow in their order, each with its workers.
        place = description["first_rank"] + rank
        self._nccl = Nccl()
        self._communicator = self._nccl.join(bytes.fromhex(description["id"]), description["ranks"], place)

    def read(self, slot: int, size: int) -> Any:
        """uint8 [size] on the GPU, when it has come."""
        import torch

        self._nccl.broadcast(self._communicator, self._buffer.data_ptr(), size)
        torch.cuda.synchronize(self._buffer.device)
        return self._buffer[:size]

    def close(self) -> None:
        """Leaves the group."""
        self._nccl.leave(self._communicator)


class _Pointer:
    """Device memory as torch takes it over."""

    def __init__(self, pointer: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}
