"""Blocks of files read by a few threads, while the device takes the blocks before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

# A disk wants several requests at a time, and the copy out of the page cache more than one core.
THREADS = 4
# Half of the buffers are being filled, half are on their way to the device. Together with the size of a block this
# bounds what is in flight: no more is held of the files in host memory.
BUFFERS = 8

Request = TypeVar("Request")
Value = TypeVar("Value")


def read_ahead(
    requests: Sequence[Request],
    block_bytes: int,
    read: Callable[[Request, np.ndarray], Value],
    take: Callable[[Request, Value], Any],
) -> None:
    """Reads each request in a thread and hands what came, in the order of the requests, to ``take``.

    Whatever ends it, an error of either function or Ctrl-C, no thread is left.

    Args:
        requests: what to read.
        block_bytes: size of a buffer: the largest request.
        read: called in a thread with a request and a buffer of bytes to read into.
        take: called in this thread with the request and what ``read`` returned; returns arrays of JAX that are ready
            once the buffer may be overwritten.
    """
    buffers = [_aligned(block_bytes) for _ in range(min(BUFFERS, len(requests)))]
    taken: list[Any] = [None] * len(buffers)
    reading: deque = deque()

    def take_oldest() -> None:
        request, slot, future = reading.popleft()
        taken[slot] = take(request, future.result())

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
    try:
        for number, request in enumerate(requests):
            slot = number % len(buffers)
            jax.block_until_ready(taken[slot])
            reading.append((request, slot, pool.submit(read, request, buffers[slot])))
            if len(reading) > len(buffers) // 2:
                take_oldest()
        while reading:
            take_oldest()
        # Errors of the device come here, not later.
        jax.block_until_ready(taken)
    finally:
        pool.shutdown(cancel_futures=True)


def _aligned(size: int) -> np.ndarray:
    """Bytes that begin where a CPU device takes memory as it is, without a copy of its own."""
    raw = np.empty(size + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:size]
