"""Where a step's time and memory went."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import jax

logger = logging.getLogger(__name__)

# The same names in JAX 0.10 and 0.11. A program found in the compilation cache sends the first, then the second.
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class PhaseTimer:
    """Adds up wall-clock seconds by phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: set[str] = set()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside, once where a phase opens itself again; phases may nest."""
        if name in self._open:
            yield
            return
        self._open.add(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._open.remove(name)
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Returns ``{"time/<phase>": seconds}`` of the phases closed since the last call, and of what was added."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


class CompileCounter:
    """Counts the programs that XLA compiles in this process, and logs each with its time at debug level.

    A program found in the compilation cache is not compiled, but the time of reading it counts.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seconds = 0.0
        self._lock = threading.Lock()
        _listen()
        _counters.add(self)

    def add(self, compiles: int, seconds: float) -> None:
        """Counts programs; called by the listener from any thread."""
        with self._lock:
            self._count += compiles
            self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Returns ``{"compiles": number, "time/compile": seconds}`` since the last call."""
        with self._lock:
            taken = {"compiles": self._count, "time/compile": self._seconds}
            self._count, self._seconds = 0, 0.0
        return taken


def peak_memory_bytes() -> int:
    """Largest memory used so far, in bytes: of the fullest local device, or of the process (resident set) on a CPU."""
    peaks = [stats["peak_bytes_in_use"] for stats in map(_memory_stats, jax.local_devices()) if stats]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory_stats(device: jax.Device) -> dict[str, int] | None:
    stats = device.memory_stats()
    return stats if stats and "peak_bytes_in_use" in stats else None


# JAX keeps listeners for the life of the process: one for all counters, which it does not keep alive.
_counters: weakref.WeakSet[CompileCounter] = weakref.WeakSet()
_thread = threading.local()
_listening = threading.Lock()


def _listen() -> None:
    if _listening.acquire(blocking=False):
        jax.monitoring.register_event_listener(_on_event)
        jax.monitoring.register_event_duration_secs_listener(_on_duration)


def _on_event(event: str, **details: Any) -> None:
    if event == _CACHE_HIT:
        _thread.cache_hit = True


def _on_duration(event: str, duration_secs: float, **details: Any) -> None:
    if event != _COMPILED:
        return
    found, _thread.cache_hit = getattr(_thread, "cache_hit", False), False
    logger.debug(
        "%s %s in %.3f s", "read" if found else "compiled", details.get("fun_name", "a program"), duration_secs
    )
    for counter in list(_counters):
        counter.add(0 if found else 1, duration_secs)
