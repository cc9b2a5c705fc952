"""Speed and memory of loading a checkpoint, against plain reads of the same files and transformers' from_pretrained.

    python benchmarks/loading.py --output loading.json
    python benchmarks/loading.py --gib 4 --fsdp 4 --output loading.json

A checkpoint of random weights, in several files as large ones are, is made in --folder and deleted afterwards. It is a
Qwen2 whose number of layers makes up the size. Each side runs in a process of its own, and all take turns: a plain
read, ours, transformers'. Once with the files out of the page cache (cold), once with them in it (warm). GB are 10^9.

raw 1, raw 4       plain reads of the same files in blocks of 16 MiB, by one thread or four
raw kept           where the host is the device: four threads read into fresh memory that stays, as large as the
                   parameters. No floor: a loader may find memory that it had before
seconds            median of the repeats; all_seconds has each. first_seconds: of the first, programs' compilation
                   included, as a run sees it; it does not count in the median where there are several repeats
gb_per_second      of the file's bytes
of_raw, of_kept    gb_per_second over that of the faster plain read, and over raw kept's, with the same state of the
                   page cache
fresh_bytes        memory that the kernel handed out in single pages, the median as of seconds. A later load of the same
                   process may find pages that the one before it has freed
final_bytes        the parameters, in host memory: 0 on a GPU
above_final_bytes  the peak of the process's resident memory while it loads, above what it was before and the
                   parameters: the largest of all loads. What else came into memory in the meantime, such as compiled
                   programs and pages of mapped files, counts

Defaults follow the platform: a GPU gets the size of a 7B model in bfloat16, a CPU 1 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import loading_sides
from columns import aligned
from machine import describe_machine, make_report

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy", "safetensors", "torch", "transformers")
GIB = {"cpu": 1.0, "gpu": 14.2}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Run = Callable[..., Any]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(worker(options)) for name in ("jaxrft", "transformers")}
        machine = sides["jaxrft"](describe_machine, PACKAGES)
        options.gib = options.gib or GIB.get(machine["device"]["platform"], GIB["gpu"])
        options.fsdp = options.fsdp or machine["device"]["count"]
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
        stack.callback(shutil.rmtree, folder)
        checkpoint = loading_sides.make_checkpoint(folder, int(options.gib * 2**30), options.dtype)
        platform = machine["device"]["platform"]
        cases = measure(options, sides, folder, checkpoint["bytes"], platform)
    report = make_report(
        "loading.py", argv, machine, options, without=("in_process",), checkpoint=checkpoint, cases=cases
    )
    print(aligned(COLUMNS, map(cells, cases)))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the files")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="on the device")
    parser.add_argument("--fsdp", type=int, help="devices that parameters are sharded over; default: all")
    parser.add_argument("--virtual-devices", type=int, help="make this many CPU devices")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each side, cold and warm (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made: a disk with room for it")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--in-process", action="store_true", help="measure here: memory is then of all sides")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats takes at least 1")
    return options


@contextlib.contextmanager
def worker(options: argparse.Namespace) -> Iterator[Run]:
    """Runs functions in one process of its own, and returns what they return."""
    if options.in_process:
        yield lambda function, *arguments: function(*arguments)
        return
    start = {"initializer": loading_sides.prepare, "initargs": (options.virtual_devices,)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def measure(
    options: argparse.Namespace, sides: dict[str, Run], folder: Path, size: int, platform: str
) -> list[dict[str, Any]]:
    """A case for each side and state of the page cache; ``error`` where it fails."""
    ratio = BYTES[options.param_dtype] / BYTES[options.dtype]
    loads = {
        "raw 1": lambda: loading_sides.read_raw(folder, threads=1),
        "raw 4": lambda: loading_sides.read_raw(folder, threads=4),
        "raw kept": lambda: loading_sides.read_kept(folder, threads=4, ratio=ratio),
        "jaxrft": lambda: sides["jaxrft"](loading_sides.load_ours, folder, options.param_dtype, options.fsdp),
        "transformers": lambda: sides["transformers"](loading_sides.load_theirs, folder, options.param_dtype, platform),
    }
    if platform != "cpu":
        del loads["raw kept"]
    if options.no_peer:
        del loads["transformers"]
    cases = {(side, cache): {"side": side, "cache": cache, "loads": []} for cache in CACHES for side in loads}
    for _ in range(options.repeats):
        for (side, cache), case in cases.items():
            try:
                loading_sides.page_cache(folder, warm=cache == "warm")
                if "error" not in case:
                    case["loads"].append(loads[side]())
            except Exception as error:
                case["error"] = f"{type(error).__name__}: {error}"[:1000]
    for case in cases.values():
        summarise(case, size)
    for (side, cache), case in cases.items():
        fastest = max(cases[raw, cache]["gb_per_second"] for raw in ("raw 1", "raw 4"))
        if not side.startswith("raw") and "error" not in case:
            case["of_raw"] = case["gb_per_second"] / fastest
            if "gb_per_second" in cases.get(("raw kept", cache), {}):
                case["of_kept"] = case["gb_per_second"] / cases["raw kept", cache]["gb_per_second"]
    return list(cases.values())


CACHES = ("cold", "warm")


def summarise(case: dict[str, Any], size: int) -> None:
    loads = case.pop("loads")
    if "error" in case:
        return
    # Programs are compiled in the first load of a process.
    counted = loads[1:] if len(loads) > 1 else loads
    case["all_seconds"] = [load["seconds"] for load in loads]
    case["first_seconds"] = case["all_seconds"][0]
    case["seconds"] = statistics.median(load["seconds"] for load in counted)
    case["gb_per_second"] = size / case["seconds"] / 1e9
    case["fresh_bytes"] = statistics.median(load["fresh_bytes"] for load in counted)
    if "final_bytes" in loads[0]:
        case["final_bytes"] = loads[0]["final_bytes"]
        case["above_final_bytes"] = max(load["above_final_bytes"] for load in loads)


COLUMNS = (
    "side", "page cache", "seconds", "first", "GB/s", "of raw", "of kept", "fresh GiB", "final GiB", "above it GiB",
)  # fmt: skip


def cells(case: dict[str, Any]) -> list[str]:
    start = [case["side"], case["cache"]]
    if "error" in case:
        return [*start, "failed: " + case["error"].splitlines()[0][:100]]
    numbers = [f"{case['seconds']:.3f}", f"{case['first_seconds']:.3f}", f"{case['gb_per_second']:.3f}"]
    ratios = [f"{case[name]:.3f}" if name in case else "-" for name in ("of_raw", "of_kept")]
    sizes = ("fresh_bytes", "final_bytes", "above_final_bytes")
    return [*start, *numbers, *ratios, *(f"{case[name] / 2**30:.3f}" if name in case else "-" for name in sizes)]


if __name__ == "__main__":
    main()
