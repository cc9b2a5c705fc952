"""Where a GPU's time goes: seconds by kernel, from a profile of a program.

    python benchmarks/kernel_times.py FOLDER

FOLDER is what :func:`profile` wrote, as with ``--trace`` of train_step.py and rollout.py. Kernels whose names differ
only in a number are one line. Idle is the time between the first kernel and the last in which none ran. A CUDA graph
may be one line: ``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` has a program run without them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from columns import aligned

# Of the report; what is below is one line.
LINES = 40


class Event(NamedTuple):
    """A kernel that ran, or a copy.

    Attributes:
        name: of the kernel.
        operation: of XLA's, that it is part of; empty where the profile does not say.
        start, seconds: when, and how long.
    """

    name: str
    operation: str
    start: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table of a folder, and returns what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the profile")
    parser.add_argument("--by", choices=("kernel", "operation"), default="kernel", help="what a line is (kernel)")
    options = parser.parse_args(argv)
    found = summarise(read(options.folder), options.by)
    total = found["busy_seconds"] or 1.0
    rows = [
        [f"{line['seconds'] * 1e3:.3f}", f"{line['seconds'] / total:.3f}", str(line["count"]), line["name"]]
        for line in found["lines"]
    ]
    print(aligned(("ms", "share", "count", options.by), rows))
    print(f"busy {found['busy_seconds'] * 1e3:.3f} ms, idle {found['idle_seconds'] * 1e3:.3f} ms")
    return found


@contextlib.contextmanager
def profile(folder: Path) -> Iterator[None]:
    """Writes a profile of what runs inside to a folder."""
    import jax

    options = jax.profiler.ProfileOptions()
    # Python's own calls would fill the profile.
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def read(folder: Path) -> list[Event]:
    """What ran on the first GPU.

    Raises:
        FileNotFoundError: the folder has no profile.
        ValueError: it has several, or none of a GPU.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no profile (*.xplane.pb)")
    if len(files) > 1:
        folders = ", ".join(sorted({str(file.relative_to(folder).parent) for file in files}))
        raise ValueError(f"{folder}: holds several profiles; name the folder of one: {folders}")
    planes = [p for p in ProfileData.from_file(str(files[0])).planes if p.name.startswith("/device:GPU:")]
    if not planes:
        raise ValueError(f"{files[0]}: the profile has no GPU in it")
    lines = [line for line in planes[0].lines if line.name.startswith("Stream")]
    return [event_of(event) for line in lines for event in line.events]


def event_of(event: Any) -> Event:
    stats = {name: value for name, value in event.stats if name is not None}
    operation = str(stats.get("name") or stats.get("tf_op") or stats.get("hlo_op") or "")
    return Event(event.name, operation, event.start_ns / 1e9, event.duration_ns / 1e9)


def summarise(events: Iterable[Event], by: str = "kernel") -> dict[str, Any]:
    """Seconds by kernel or operation, the longest first, and in all."""
    events = list(events)
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        name = stem(event.name if by == "kernel" else event.operation or event.name)
        seconds[name] += event.seconds
        counts[name] += 1
    names = sorted(seconds, key=lambda name: -seconds[name])
    lines = [{"name": name, "seconds": seconds[name], "count": counts[name]} for name in names[:LINES]]
    if rest := names[LINES:]:
        others = {"seconds": sum(seconds[name] for name in rest), "count": sum(counts[name] for name in rest)}
        lines.append({"name": "others", **others})
    busy, idle = covered(events)
    return {"lines": lines, "busy_seconds": busy, "idle_seconds": idle}


def stem(name: str) -> str:
    """A name without the numbers that tell equal kernels of different layers apart."""
    name = re.sub(r"(?<=layers[./\[])\d+", "*", name)
    return re.sub(r"(_\d+)+$|(\.\d+)+$", "", name)


def covered(events: Sequence[Event]) -> tuple[float, float]:
    """Seconds in which something ran, and in which nothing did, between the first start and the last end."""
    busy, end = 0.0, None
    for event in sorted(events, key=lambda event: event.start):
        stop = event.start + event.seconds
        begin = event.start if end is None else max(event.start, end)
        busy += max(0.0, stop - begin)
        end = stop if end is None else max(end, stop)
    if end is None:
        return 0.0, 0.0
    return busy, end - min(event.start for event in events) - busy


if __name__ == "__main__":
    main(sys.argv[1:])
