"""The machine: what a report says of it and of the command, and when it is free for the next side."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SETTLING = 0.5


def settle() -> None:
    """Waits on a CPU until the threads of the side before sleep: they spin for a while, on the next side's cores."""
    import jax

    if jax.default_backend() == "cpu":
        time.sleep(SETTLING)


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


def make_report(
    script: str,
    argv: Sequence[str],
    machine: dict[str, Any],
    options: argparse.Namespace,
    without: Iterable[str] = (),
    **parts: Any,
) -> dict[str, Any]:
    """A benchmark's report; written to ``options.output`` where that is given.

    Args:
        script, argv: its command.
        machine: as :func:`describe_machine` gives it.
        options: as the command line says; those in ``without``, and the file itself, are left out.
        parts: what it measured, by name.
    """
    report = {
        "command": command_line(script, argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_code(),
        **machine,
        "options": options_of(options, without=("output", *without)),
        **parts,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _code() -> dict[str, Any]:
    """The commit that ran, and how many files differed from it, results and pages aside; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/docs")
    return {"commit": commit, "changed_files": None if changed is None else len(changed.splitlines())}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
