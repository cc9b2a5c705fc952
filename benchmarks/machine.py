"""What a report says of the machine and the command that it was made with."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
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


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command, without folders of this machine: an interpreter given by its full path becomes PYTHON."""
    return shlex.join(["python", f"benchmarks/{script}", *map(_shown, argv)])


def options_of(arguments: argparse.Namespace, without: Iterable[str] = ()) -> dict[str, Any]:
    """The options as the report has them, likewise without folders."""
    kept = {name: value for name, value in vars(arguments).items() if name not in set(without)}
    return {name: _shown(str(v)) if isinstance(v, (str, Path)) else v for name, v in kept.items()}


def _shown(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not os.path.isabs(value):
        return word
    name = os.path.basename(value)
    return option + equals + ("PYTHON" if name.startswith("python") else name)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
