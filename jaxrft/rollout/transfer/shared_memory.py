"""Buckets through POSIX shared memory: trainer and servers on one machine, whatever their devices."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrft.config import ConfigError

FOLDER = Path("/dev/shm")


class SharedMemory:
    """Slots in a file of ``/dev/shm`` that has no name once the servers have opened it: none is left behind.

    Args:
        slot_bytes: room of a slot.
        slots: buckets that may be under way at once.

    Raises:
        ConfigError: there is not as much shared memory.
    """

    name = "shared_memory"
    put_first = True

    def __init__(self, slot_bytes: int, slots: int = 2):
        self.slots, self._slot_bytes = slots, slot_bytes + -slot_bytes % mmap.PAGESIZE
        size = self._slot_bytes * slots
        self._path = FOLDER / f"jaxrft-{os.getpid()}-{secrets.token_hex(8)}"
        handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserved at once: writing to memory that is not there would end the process.
            os.posix_fallocate(handle, 0, size)
            self._map = mmap.mmap(handle, size)
        except OSError as error:
            self._path.unlink()
            raise ConfigError(
                f"rollout.vllm.bucket_mib: {size / 2**20:.0f} MiB of shared memory are not to be had in {FOLDER} "
                f"({error.strerror}); enlarge it (in a container: --shm-size), or lower bucket_mib where no "
                "tensor of the model is as large"
            ) from error
        finally:
            os.close(handle)

    def describe(self, server: int) -> dict[str, Any]:
        """What a server's workers open."""
        return {"kind": self.name, "path": str(self._path), "slot_bytes": self._slot_bytes}

    def connect(self) -> None:
        """Nothing to do: the servers open a file."""

    def opened(self) -> None:
        """Takes the name away; the memory goes with the last process that has it open."""
        self._path.unlink(missing_ok=True)

    def put(self, slot: int, packed: jax.Array) -> None:
        """Copies a packed bucket into a slot."""
        self.bytes_of(slot, packed.nbytes)[:] = np.asarray(packed).view(np.uint8)

    def bytes_of(self, slot: int, size: int) -> np.ndarray:
        """uint8 [size]: what lies in a slot."""
        return np.frombuffer(self._map, np.uint8, size, slot * self._slot_bytes)

    def close(self) -> None:
        """Lets go of the memory."""
        self.opened()
        with contextlib.suppress(BufferError):
            self._map.close()
