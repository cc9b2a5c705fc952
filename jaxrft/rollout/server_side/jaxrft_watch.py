"""Ends a server whose trainer is gone, however it went: nothing is left that holds a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import time

SECONDS_TO_END = 10.0


def start_time(process: int) -> int | None:
    """When a process was started, in ticks since boot; None where it has ended (a zombie too).

    Together with its number this names a process for good: numbers are used again.
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            # The name stands in parentheses and may hold any character.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def watch(process: int, started: int, seconds: float = 0.5) -> None:
    """Splits off a process that ends this one's group as soon as ``process`` or this one is gone.

    Args:
        process: the trainer.
        started: its start time.
        seconds: between looks.
    """
    server = os.getpid()
    if os.getpgrp() != server:
        os.setpgid(0, 0)
    if os.fork() != 0:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while start_time(process) == started and os.getppid() == server:
            time.sleep(seconds)
        end_group(server)
    finally:
        os._exit(0)


def end_group(group: int) -> None:
    """Asks all processes of a group to end, and ends those that have not after some seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < deadline and _others(group):
            time.sleep(0.2)
        os.killpg(group, signal.SIGKILL)


def _others(group: int) -> bool:
    """Whether a group has living members beside this process."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry)) == group and start_time(int(entry)) is not None:
                return True
    return False
