"""Libraries of C functions with the names and types of CUDA's and NCCL's, over ordinary memory.

Arguments pass through the C calling convention, as they would on their way to the real libraries. What is
asynchronous there does not happen here until someone waits for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_void_p
from typing import Any

INVALID = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3


def _structure(size: int) -> type[ctypes.Structure]:
    return type(f"Bytes{size}", (ctypes.Structure,), {"_fields_": [("content", ctypes.c_ubyte * size)]})


Handle, UniqueId, Uuid = _structure(64), _structure(128), _structure(16)


def c(*types: Any) -> Callable[[Any], Any]:
    """Marks a method as a C function that answers with a code (None: 0)."""

    def mark(method: Any) -> Any:
        method.types = types
        return method

    return mark


class FakeLibrary:
    """``failing`` maps names of functions to the codes that their next calls answer with, in turn."""

    def __init__(self, log: list[str] | None = None):
        self.log = [] if log is None else log
        self.failing: dict[str, list[int]] = {}
        self.last_error = 0
        self._texts: list[Any] = []
        for name in dir(type(self)):
            method = getattr(self, name)
            if hasattr(method, "types"):
                setattr(self, name, self._function(name, method))

    def _function(self, name: str, method: Any) -> Any:
        def call(*arguments: Any) -> int:
            self.log.append(name)
            codes = self.failing.get(name)
            code = codes.pop(0) if codes else 0
            self.last_error = code = code or method(*arguments) or 0
            return code

        return CFUNCTYPE(c_int, *method.types)(call)

    def _describer(self, words: str) -> Any:
        def describe(code: int) -> int:
            self._texts.append(ctypes.create_string_buffer(f"{words} {code}".encode()))
            return ctypes.addressof(self._texts[-1])

        return CFUNCTYPE(c_void_p, c_int)(describe)


class FakeRuntime(FakeLibrary):
    """libcudart. ``memory`` maps addresses to (device, buffer); ``opened`` lists handles in use."""

    def __init__(self, log: list[str] | None = None):
        super().__init__(log)
        self.device = 0
        self.memory: dict[int, tuple[int, Any]] = {}
        self.handles: dict[bytes, int] = {}
        self.opened: list[int] = []
        self._pending: list[tuple[int, int, int]] = []
        self.cudaGetErrorString = self._describer("the runtime's words for")
        self.cudaGetLastError = CFUNCTYPE(c_int)(self._get_last_error)

    def _get_last_error(self) -> int:
        code, self.last_error = self.last_error, 0
        return code

    @c(c_int)
    def cudaSetDevice(self, device):  # noqa: N802
        self.device = device

    @c(POINTER(c_void_p), c_size_t)
    def cudaMalloc(self, pointer, size):  # noqa: N802
        buffer = ctypes.create_string_buffer(size)
        pointer[0] = ctypes.addressof(buffer)
        self.memory[pointer[0]] = (self.device, buffer)

    @c(c_void_p)
    def cudaFree(self, pointer):  # noqa: N802
        return None if self.memory.pop(pointer, None) else INVALID

    @c(POINTER(Handle), c_void_p)
    def cudaIpcGetMemHandle(self, handle, pointer):  # noqa: N802
        # Zero bytes at both ends and within.
        content = bytes([0, len(self.handles) + 1, 0, *range(200, 256), 0, 7, 9, 0, 0])
        self.handles[content] = pointer
        ctypes.memmove(handle, content, 64)

    @c(POINTER(c_void_p), Handle, c_uint)
    def cudaIpcOpenMemHandle(self, pointer, handle, flags):  # noqa: N802
        if bytes(handle) not in self.handles or flags != 1:
            return INVALID
        pointer[0] = self.handles[bytes(handle)]
        self.opened.append(pointer[0])
        return 0

    @c(c_void_p)
    def cudaIpcCloseMemHandle(self, pointer):  # noqa: N802
        self.opened.remove(pointer)

    @c(c_void_p, c_void_p, c_size_t, c_int, c_void_p)
    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        fits = any(a <= target and target + size <= a + len(b) for a, (_, b) in self.memory.items())
        if not fits or kind != 3 or stream is not None:
            return INVALID
        self._pending.append((target, source, size))
        return 0

    @c(c_void_p)
    def cudaStreamSynchronize(self, stream):  # noqa: N802
        if stream is not None:
            return INVALID
        while self._pending:
            ctypes.memmove(*self._pending.pop(0))
        return 0


class FakeDriver(FakeLibrary):
    """libcuda, with devices whose identifiers are 16 bytes that tell their number."""

    ready = False

    @c(c_uint)
    def cuInit(self, flags):  # noqa: N802
        self.ready = True

    @c(POINTER(c_int), c_int)
    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        device[0] = 100 + ordinal
        return 0 if self.ready else NOT_INITIALIZED

    @c(POINTER(Uuid), c_int)
    def cuDeviceGetUuid_v2(self, uuid, device):  # noqa: N802
        ctypes.memmove(uuid, bytes([0xAB, 0, *range(13), device - 100]), 16)


class FakeNccl(FakeLibrary):
    """libnccl. ``joined`` lists (ranks, rank) by communicator; ``sent`` what each root sent."""

    identity = bytes([0, 2, 0, *range(123), 0, 0])

    def __init__(self, log: list[str] | None = None):
        super().__init__(log)
        self.joined: dict[int, tuple[int, int]] = {}
        self.sent: list[bytes] = []
        self.ncclGetErrorString = self._describer("NCCL's words for")

    @c(POINTER(c_int))
    def ncclGetVersion(self, version):  # noqa: N802
        version[0] = 22705

    @c(POINTER(UniqueId))
    def ncclGetUniqueId(self, identity):  # noqa: N802
        ctypes.memmove(identity, self.identity, 128)

    @c(POINTER(c_void_p), c_int, UniqueId, c_int)
    def ncclCommInitRank(self, communicator, ranks, identity, rank):  # noqa: N802
        if bytes(identity) != self.identity or not 0 <= rank < ranks:
            return INVALID
        # Wider than 32 bits, as addresses are.
        communicator[0] = (1 << 40) + rank
        self.joined[communicator[0]] = (ranks, rank)
        return 0

    @c(c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)
    def ncclBroadcast(self, source, target, count, kind, root, communicator, stream):  # noqa: N802
        if kind != 1 or stream is not None or source != target:
            return INVALID
        if self.joined[communicator][1] == root:
            self.sent.append(ctypes.string_at(source, count))
        else:
            ctypes.memmove(target, self.sent[-1], count)
        return 0

    @c(c_void_p)
    def ncclCommAbort(self, communicator):  # noqa: N802
        return None if self.joined.pop(communicator, None) else INVALID
