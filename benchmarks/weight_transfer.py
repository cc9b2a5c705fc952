"""Speed of an update of the servers' weights, by transport and size of model, against a plain copy of the same bytes.

    python benchmarks/weight_transfer.py --output weight_transfer.json
    python benchmarks/weight_transfer.py --sizes 1.5B 7B --vllm ~/vllm/bin/python --output weight_transfer.json

Each size is measured against a process that stands for a server's worker: it opens the transport's memory and copies
every byte to memory of its own, so that the transport is measured by itself. With --vllm it is measured against a real
server too: the whole update, from the pause to the resumption. Models are Qwen2's with random weights. Updates and
copies take turns, after one of each; medians of the repeats count. GB are 10^9 bytes.

seconds           of an update; update_seconds has all repeats
gb_per_second     bytes sent over seconds
seconds_per_3_gb  what 3 GB take at that speed. The goal is below 0.1 s, for bfloat16 on one H200
parts             seconds spent on packing (pack), on bringing buckets to their slots (put), and waiting for the server
                  to pause (begin), to take buckets (load) and to resume (finish). Packing and loading overlap, so that
                  parts may add up to more than the whole. receive: the stand-in's reading alone, inside load
copy              a jitted copy of every parameter, in the type that is sent, on the trainer's device
speed_over_copy   GB/s over the copy's; fastest_over_copy: of the fastest repeats, which other work disturbs least

Defaults follow the platform: a GPU gets 0.5B and 1.5B, a CPU small shapes. On one GPU the transport is cuda_ipc.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import step_shapes
from columns import aligned
from machine import describe_machine, make_report

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy")
GOAL = {"bytes": 3e9, "below_seconds": 0.1, "dtype": "bfloat16", "device": "H200"}
SIZES = {"cpu": ["tiny", "small"], "gpu": ["0.5B", "1.5B"]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    # The receivers need memory of the same GPU. Threads that wait busily would take the other side's cores.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import transfer_case

    machine = describe_machine(PACKAGES)
    arguments.sizes = arguments.sizes or SIZES.get(machine["device"]["platform"], SIZES["gpu"])
    arguments.receiver = arguments.receiver or arguments.vllm or sys.executable
    measures = {} if arguments.no_stand_in else {"stand-in": transfer_case.stand_in_case}
    measures |= {"vllm": transfer_case.vllm_case} if arguments.vllm else {}
    cases = []
    for size in arguments.sizes:
        for receiver, run in measures.items():
            case = {"receiver": receiver, "size": size, "dtype": arguments.dtype}
            try:
                case |= run(size, arguments)
            except Exception as error:
                case["error"] = f"{type(error).__name__}: {error}"[:1000]
            cases.append(case)
            print("  ".join(cells(case)), file=sys.stderr, flush=True)
    report = make_report(
        "weight_transfer.py",
        argv,
        machine,
        arguments,
        goal=GOAL | {"reached": reached(cases, machine["device"]["kind"])},
        cases=cases,
    )
    print(aligned(COLUMNS, map(cells, cases)))
    print(f"goal: 3 GB of bfloat16 in below {GOAL['below_seconds']} s on one H200: {in_words(report)}")
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=step_shapes.SHAPES, help="0.5B to 7B: of Qwen2.5")
    parser.add_argument("--transport", choices=("auto", "cuda_ipc", "shared_memory", "nccl"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of what is sent")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of the trainer's")
    parser.add_argument("--bucket-mib", type=int, default=256, help="weights that travel together (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates (default: 5)")
    parser.add_argument("--checksum", action="store_true", help="check every bucket of the timed updates too")
    parser.add_argument("--receiver", metavar="PYTHON", help="has torch, for the stand-in; default: vLLM's or this")
    parser.add_argument("--no-stand-in", action="store_true", help="measure vLLM only")
    parser.add_argument("--vllm", metavar="PYTHON", help="has vLLM: update a real server too")
    parser.add_argument("--vllm-memory", type=float, default=0.4, help="share of a GPU's memory (default: 0.4)")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or arguments.bucket_mib < 1:
        parser.error("--repeats and --bucket-mib take at least 1")
    if arguments.no_stand_in and not arguments.vllm:
        parser.error("--no-stand-in leaves nothing to measure without --vllm")
    return arguments


def reached(cases: Sequence[dict[str, Any]], device: str) -> dict[str, bool | None]:
    """Whether each receiver reached the goal, by the case nearest to 3 GB; None: not measured on such a device."""
    found: dict[str, bool | None] = {}
    for receiver in dict.fromkeys(case["receiver"] for case in cases):
        fit = [case for case in cases if case["receiver"] == receiver and "error" not in case]
        fit = [case for case in fit if case["dtype"] == GOAL["dtype"] and GOAL["device"] in device]
        # Much less than 3 GB says little of it.
        fit = [case for case in fit if case["bytes"] > GOAL["bytes"] / 2]
        nearest = min(fit, key=lambda case: abs(case["bytes"] - GOAL["bytes"]), default=None)
        found[receiver] = None if nearest is None else nearest["seconds_per_3_gb"] < GOAL["below_seconds"]
    return found


def in_words(report: dict[str, Any]) -> str:
    words = {None: "not measured here", True: "reached", False: "missed"}
    return ", ".join(f"{receiver} {words[value]}" for receiver, value in report["goal"]["reached"].items())


COLUMNS = ("receiver", "size", "dtype", "transport", "GB", "seconds", "GB/s", "x copy", "s per 3 GB", "parts")


def cells(case: dict[str, Any]) -> list[str]:
    start = [case["receiver"], case["size"], case["dtype"]]
    if "error" in case:
        return [*start, "failed: " + case["error"].splitlines()[0][:100]]
    parts = " ".join(f"{name}={seconds:.4f}" for name, seconds in case["parts"].items())
    numbers = [f"{case['bytes'] / 1e9:.4f}", f"{case['seconds']:.4f}", f"{case['gb_per_second']:.2f}"]
    return [
        *start,
        case["transport"],
        *numbers,
        f"{case['speed_over_copy']:.3f}",
        f"{case['seconds_per_3_gb']:.3f}",
        parts,
    ]


if __name__ == "__main__":
    main()
