"""What a report says of the machine that it was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Device, host and versions; None for a package that is not installed."""
    import jax

    device = jax.devices()[0]
    return {
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "host": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
