"""Speed and memory of one optimizer step, by shape, length, strategy and mesh; beside torch where it is installed.

    python benchmarks/train_step.py --output train_step.json
    python benchmarks/train_step.py --pass logprobs --output logprobs.json
    python benchmarks/train_step.py --models 0.5B 1.5B --lengths 2048 8192 --dtypes bfloat16 --remat none full
    python benchmarks/train_step.py --virtual-devices 4 --meshes fsdp=4 fsdp=2,tensor=2 sequence=4 --no-peer

Every combination of the options is a case, measured in a process of its own, so that a device's peak memory is the
case's. What fails is written with its error, and the others go on. A case is the trainer's own jitted step (GRPO's
loss without a reference, AdamW, clipped gradients, entropy and statistics included) on ragged random samples that the
trainer's code makes into a batch. Models have random weights: speed does not depend on them. With --pass logprobs it is
the trainer's forward pass instead, which gives the log-probability of every response token: a third of the FLOPs.

seconds            median of the timed steps, after warm-up, with the device waited for
tokens_per_second  valid tokens of prompts and responses; computed_tokens_per_second counts padding too
utilisation        model FLOPs per second over the matmul ceiling. FLOPs of a step are {flops}
matmul_ceiling     what square products of the same dtype reach on the same device, measured before and after the
                   steps, the better one; times the number of devices, but for virtual ones, which share one machine
memory             a GPU's peak_bytes_in_use; on a CPU the compiled program's arguments and temporaries
plan               what the trainer's memory plan says of an update
torch              the same step by transformers and torch (see step_torch.py): same tokens, same rows, same
                   projection of response tokens alone, steps taking turns with ours; on one device only
speed_over_torch   torch's median seconds over ours; fastest_over_torch: the same of the fastest steps, which other
                   work on the machine disturbs least

Defaults follow the platform: a GPU gets 0.5B and 1.5B in bfloat16 at 2048 and 8192 tokens, a CPU small shapes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import step_shapes
from columns import aligned
from machine import describe_machine, make_report

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
AXES = ("replica", "fsdp", "sequence", "tensor")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": ["small"], "lengths": [256], "dtypes": ["float32"], "remat": ["none", "full"], "tokens": 1024},
    "gpu": {
        "models": ["0.5B", "1.5B"], "lengths": [2048, 8192], "dtypes": ["bfloat16"], "remat": ["none", "full"],
        "tokens": 16384,
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    run = in_this_process if options.in_process else in_a_process
    machine = run(describe_machine, options, PACKAGES)
    defaults = DEFAULTS.get(machine["device"]["platform"], DEFAULTS["gpu"])
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    cases = []
    for case in make_cases(options):
        cases.append(measure(run, case, options))
        print(row(cases[-1]), file=sys.stderr, flush=True)
    report = make_report(
        "train_step.py", argv, machine, options, without=("in_process",), flops=step_shapes.FLOPS, cases=cases
    )
    print(aligned(COLUMNS, map(cells, cases)))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    description = (__doc__ or "").replace("{flops}", step_shapes.FLOPS)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=step_shapes.SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the longest sample")
    parser.add_argument(
        "--pass", dest="work", choices=("update", "logprobs"), default="update", help="what is measured"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--offload-optimizer", action="store_true", help="keep its moments in the host's memory")
    parser.add_argument("--strategies", nargs="+", default=["auto"], help="auto: what shards most on the mesh")
    parser.add_argument("--meshes", nargs="+", default=[mesh("1")], type=mesh, help="1, or such as fsdp=2,tensor=2")
    parser.add_argument("--remat", nargs="+", choices=("auto", "none", "full", "save", "offload"))
    parser.add_argument("--scan-layers", nargs="+", default=["no"], choices=("no", "yes"))
    parser.add_argument("--batching", nargs="+", default=["padded", "packed"], choices=("padded", "packed"))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4], help="of an optimizer step")
    parser.add_argument("--rows", type=int, help="samples of a device in a micro-batch; default: as --tokens allow")
    parser.add_argument("--tokens", type=int, help="tokens of a device in a padded micro-batch, without --rows")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--ceiling-size", type=int, help="of the ceiling's matrices; default: 1024, on a GPU 8192")
    parser.add_argument("--virtual-devices", type=int, help="make this many CPU devices")
    parser.add_argument("--compilation-cache", metavar="FOLDER", help="of compiled programs; default: none is used")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="profile a step of each (see kernel_times.py)")
    parser.add_argument("--no-peer", action="store_true", help="do not run torch")
    parser.add_argument("--in-process", action="store_true", help="measure here: memory on a GPU is then of all cases")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if options.warm_up < 1 or options.steps < 1:
        parser.error("--warm-up and --steps take at least 1")
    return options


def mesh(text: str) -> dict[str, int]:
    sizes = dict.fromkeys(AXES, 1)
    for part in [] if text == "1" else text.split(","):
        name, equals, size = part.partition("=")
        if name not in AXES or not equals or not size.isdigit():
            raise argparse.ArgumentTypeError(f"got {text!r}, takes 1, or sizes of {', '.join(AXES)} such as fsdp=2")
        sizes[name] = int(size)
    return sizes


def make_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fields of every case."""
    axes = itertools.product(
        options.models, options.lengths, options.dtypes, options.meshes, options.strategies, options.remat,
        options.scan_layers, options.batching, options.micro_batches,
    )  # fmt: skip
    return [
        {
            "model": model,
            "length": length,
            "dtype": dtype,
            "mesh": sizes,
            "strategy": None if strategy == "auto" else strategy,
            "remat": remat,
            "scan_layers": scan == "yes",
            "packed": batching == "packed",
            "micro_batches": micro,
            "rows": options.rows or max(1, options.tokens // length),
            "work": options.work,
            "param_dtype": options.param_dtype,
            "offload_optimizer": options.offload_optimizer,
        }
        for model, length, dtype, sizes, strategy, remat, scan, batching, micro in axes
    ]


def measure(run: Callable[..., Any], case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One case's record. A process that dies is an error of its case alone."""
    settings = {
        "steps": options.steps, "warm_up": options.warm_up, "peer": not options.no_peer,
        "ceiling_size": options.ceiling_size, "trace": options.trace,
    }  # fmt: skip
    try:
        return run(measure_here, options, case, settings)
    except Exception as error:
        return {"settings": case, "error": f"{type(error).__name__}: {error}"[:1000]}


def measure_here(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    import step_case

    return step_case.run_case(step_case.Case(**case), **settings)


def in_this_process(function: Callable[..., Any], options: argparse.Namespace, *arguments: Any) -> Any:
    if options.virtual_devices:
        from jaxrft.config import ParallelConfig, environment

        environment.apply(ParallelConfig(virtual_devices=options.virtual_devices))
    return function(*arguments)


def in_a_process(function: Callable[..., Any], options: argparse.Namespace, *arguments: Any) -> Any:
    started = (options.virtual_devices, options.compilation_cache)
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=prepare, initargs=started
    ) as pool:
        return pool.submit(function, *arguments).result()


def prepare(virtual_devices: int | None, compilation_cache: str | None) -> None:
    """Settings of a process of its own: compile times are no cache's by default, and torch finds memory on a GPU."""
    from jaxrft.config import ParallelConfig, environment

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment.apply(ParallelConfig(virtual_devices=virtual_devices, compilation_cache=compilation_cache))


COLUMNS = (
    "model", "length", "dtype", "mesh", "strategy", "remat", "rows", "micro", "tokens/s", "with padding", "s/step",
    "utilisation", "GiB", "planned", "compile s", "x torch", "x fastest",
)  # fmt: skip


def cells(case: dict[str, Any]) -> list[str]:
    settings = case["settings"]
    sizes = ",".join(f"{name}={size}" for name, size in settings["mesh"].items() if size > 1) or "1"
    remat = case.get("remat", settings["remat"]) + (" scan" if settings["scan_layers"] else "")
    rows = "packed" if settings["packed"] else "padded"
    strategy = case.get("strategy") or settings["strategy"] or "auto"
    named = [settings["model"], settings["length"], settings["dtype"], sizes, strategy, remat, rows]
    start = [str(value) for value in [*named, settings["micro_batches"]]]
    if "error" in case:
        return [*start, "failed: " + case["error"].splitlines()[0][:100]]
    return [
        *start,
        f"{case['tokens_per_second']:.0f}",
        f"{case['computed_tokens_per_second']:.0f}",
        f"{case['seconds']:.3f}",
        f"{case['utilisation']:.3f}",
        f"{case['memory']['peak_bytes'] / 2**30:.3f}",
        f"{case['plan']['update_bytes'] / 2**30:.3f}" if "plan" in case else "-",
        f"{case['lower_seconds'] + case['compile_seconds']:.1f}",
        *(f"{case[name]:.2f}" if name in case else "-" for name in ("speed_over_torch", "fastest_over_torch")),
    ]


def row(case: dict[str, Any]) -> str:
    return "  ".join(cells(case))


if __name__ == "__main__":
    main()
