"""The few functions of CUDA and NCCL that a transfer of weights needs, by ctypes; both ends of it use them.

Libraries are looked for when a class is made, so this module can be imported anywhere.
"""

from __future__ import annotations

import ctypes
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

DEVICE_TO_DEVICE = 3
LAZY_PEER_ACCESS = 1
NCCL_UINT8 = 1


# C passes these by value. Unsigned bytes, as ctypes cuts an array of c_char at its first zero.
class _MemoryHandle(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * 64),)


class _UniqueId(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * 128),)


class _Uuid(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * 16),)


RUNTIME: dict[str, list[Any]] = {
    "cudaSetDevice": [c_int],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaIpcGetMemHandle": [POINTER(_MemoryHandle), c_void_p],
    "cudaIpcOpenMemHandle": [POINTER(c_void_p), _MemoryHandle, c_uint],
    "cudaIpcCloseMemHandle": [c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamSynchronize": [c_void_p],
    "cudaGetLastError": [],
}
DRIVER: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetUuid_v2": [POINTER(_Uuid), c_int],
}
NCCL: dict[str, list[Any]] = {
    "ncclGetVersion": [POINTER(c_int)],
    "ncclGetUniqueId": [POINTER(_UniqueId)],
    "ncclCommInitRank": [POINTER(c_void_p), c_int, _UniqueId, c_int],
    "ncclBroadcast": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclCommAbort": [c_void_p],
}


class Cuda:
    """Memory of GPUs. Calls act on the device that is current in the calling thread.

    Args:
        runtime: libcudart, if it has been loaded already.
        driver: libcuda, likewise.

    Raises:
        OSError: a library is missing.
    """

    def __init__(self, runtime: Any = None, driver: Any = None):
        runtime = runtime or _load("cudart", (".13", ".12", ""), ("cu13", "cuda_runtime"))
        self._runtime = _declare(runtime, RUNTIME, "cudaGetErrorString")
        self._driver = _declare(driver or _load("cuda", (".1", ""), ()), DRIVER, None)

    def set_device(self, ordinal: int) -> None:
        """Makes a device current in this thread."""
        self._call("cudaSetDevice", ordinal)

    def allocate(self, size: int) -> int:
        """Address of ``size`` new bytes on the current device, outside any framework's pool.

        Raises:
            RuntimeError: there is no room for them.
        """
        pointer = c_void_p()
        self._call("cudaMalloc", byref(pointer), size)
        assert pointer.value is not None
        return pointer.value

    def free(self, pointer: int) -> None:
        """Gives memory back; no other process may have it open."""
        self._call("cudaFree", pointer)

    def export_handle(self, pointer: int) -> bytes:
        """64 bytes by which another process on this host opens memory from ``allocate``."""
        handle = _MemoryHandle()
        self._call("cudaIpcGetMemHandle", byref(handle), pointer)
        return bytes(handle)

    def open_handle(self, handle: bytes) -> int:
        """Address, in this process, of memory that another process exported.

        Raises:
            RuntimeError: the memory is on a GPU that the current device has no access to, or this process made it.
        """
        pointer = c_void_p()
        given = _MemoryHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", byref(pointer), given, LAZY_PEER_ACCESS)
        assert pointer.value is not None
        return pointer.value

    def close_handle(self, pointer: int) -> None:
        """Lets go of memory from ``open_handle``."""
        self._call("cudaIpcCloseMemHandle", pointer)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies ``size`` bytes between two places on devices; returns when they are there."""
        # Between devices even cudaMemcpy may return early, so the wait is said aloud.
        self._call("cudaMemcpyAsync", target, source, size, DEVICE_TO_DEVICE, None)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for the current device's default stream, not for the work of frameworks on their own streams."""
        self._call("cudaStreamSynchronize", None)

    def uuid(self, ordinal: int) -> str:
        """Which GPU a device is, the same in every process: 32 hex digits as 8-4-4-4-12, as torch prints it."""
        device, found = c_int(), _Uuid()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", byref(device), ordinal)
        self._call("cuDeviceGetUuid_v2", byref(found), device)
        return str(uuid.UUID(bytes=bytes(found)))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver if name in DRIVER else self._runtime, name)(*arguments)
        if code != 0:
            # The runtime keeps an error for whoever asks next, which would be a framework that shares the library.
            self._runtime.cudaGetLastError()
            # Codes of runtime and driver mean the same.
            raise _failure(name, code, self._runtime.cudaGetErrorString(code))


class Nccl:
    """Broadcasts between GPUs of several processes.

    Args:
        library: libnccl, if it has been loaded already.

    Raises:
        OSError: it is missing.
    """

    def __init__(self, library: Any = None):
        self._library = _declare(library or _load("nccl", (".2", ""), ("nccl",)), NCCL, "ncclGetErrorString")

    def version(self) -> int:
        """Such as 22705 for 2.27.5."""
        version = c_int()
        self._call("ncclGetVersion", byref(version))
        return version.value

    def unique_id(self) -> bytes:
        """128 bytes by which the members of one new group find each other."""
        made = _UniqueId()
        self._call("ncclGetUniqueId", byref(made))
        return bytes(made)

    def join(self, identity: bytes, ranks: int, rank: int) -> int:
        """Joins a group with the current device; waits until all its members do.

        Args:
            identity: from ``unique_id``.
            ranks: how many members there are.
            rank: of this one.

        Returns:
            The communicator.
        """
        communicator = c_void_p()
        given = _UniqueId.from_buffer_copy(identity)
        self._call("ncclCommInitRank", byref(communicator), ranks, given, rank)
        assert communicator.value is not None
        return communicator.value

    def broadcast(self, communicator: int, pointer: int, size: int, root: int = 0) -> None:
        """Starts to fill ``size`` bytes on every member with the root's, on the default stream.

        The communicator's device must be current; the caller waits for the stream. The root's bytes are only read.
        """
        self._call("ncclBroadcast", pointer, pointer, size, NCCL_UINT8, root, communicator, None)

    def leave(self, communicator: int) -> None:
        """Leaves a group, at once: ending it in order would wait for the others, of whom some may be gone."""
        self._call("ncclCommAbort", communicator)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise _failure(name, code, self._library.ncclGetErrorString(code))


def _declare(library: Any, types: dict[str, list[Any]], describe: str | None) -> Any:
    """The library, with the types of its functions; ``describe`` names the one that puts an error into words."""
    for name, arguments in types.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    if describe is not None:
        function = getattr(library, describe)
        function.argtypes, function.restype = [c_int], c_char_p
    return library


def _failure(name: str, code: int, text: bytes | None) -> RuntimeError:
    return RuntimeError(f"{name} failed with code {code}: {(text or b'unknown error').decode(errors='replace')}")


def _load(name: str, endings: Sequence[str], wheels: Sequence[str]) -> ctypes.CDLL:
    """The copy that this process has already, else one from NVIDIA's wheels, else the system's."""
    failures: list[OSError] = []
    for candidate in _candidates(name, endings, wheels):
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            failures.append(error)
    folders = "".join(f", in no folder nvidia/{wheel}/lib of sys.path" for wheel in wheels)
    raise OSError(f"lib{name}.so is missing: it is not loaded{folders}, and not on the system ({failures[0]})")


def _candidates(name: str, endings: Sequence[str], wheels: Sequence[str]) -> Iterator[str]:
    # Some wheels put a hash into the name; other words there belong to other libraries (libnccl-net.so).
    pattern = re.compile(rf"lib{name}(-[0-9a-f]{{8}})?\.so[.\d]*")
    maps = Path("/proc/self/maps")
    for line in maps.read_text(errors="replace").splitlines() if maps.exists() else ():
        path = line.split(maxsplit=5)[5:]
        if path and pattern.fullmatch(Path(path[0]).name):
            yield path[0]
    for folder in filter(None, sys.path):
        for wheel in wheels:
            files = (Path(folder) / "nvidia" / wheel / "lib" / f"lib{name}.so{ending}" for ending in endings)
            yield from (str(file) for file in files if file.exists())
    yield from (f"lib{name}.so{ending}" for ending in endings)
