"""Speed and memory of log-probabilities and entropies fused with the output projection, against its bare products.

    python benchmarks/projection.py --output projection.json
    python benchmarks/projection.py --tokens 8192 16384 --hidden 896 3584 --dtypes bfloat16 --output projection.json

Every combination of the options is a case. Its sides take turns, and all work on one device:

jaxrft         projected_logprobs, as a train step calls it; the parameter's cast to the dtype of the computation is
               part of it
matmuls        the products it needs and nothing else, in its chunks: hidden @ kernel; with gradients that again,
               d_logits @ kernel.T summed over the chunks in float32, and hidden.T @ d_logits, whose float32 columns
               are put together to the kernel's gradient. The cast is part of it
whole matmuls  the same products, each at once: all logits are held
naive          log_softmax of all logits, and the gradient that JAX makes of it

seconds        median of the repeats; fastest_seconds: of the fastest, which other work on the machine disturbs least
over_matmuls   seconds over those of the bare products in the same chunks; fastest_over_matmuls. The goal is 1.1
temporary_bytes, result_bytes   of the compiled program. The kernel's gradient is a result
utilisation    2 x tokens x hidden x vocabulary FLOPs for each product, over the seconds and over what square products
               of the same dtype reach on the same device

Defaults follow the platform: a GPU gets 8192 and 16384 tokens, hidden sizes of 0.5B, 1.5B and 7B, bfloat16; a CPU 512
tokens, hidden size 896, float32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from columns import aligned
from machine import describe_machine, make_report

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy")
GOAL = {"over_matmuls": 1.1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": [512], "hidden": [896], "dtypes": ["float32"]},
    "gpu": {"tokens": [8192, 16384], "hidden": [896, 1536, 3584], "dtypes": ["bfloat16"]},
}
SIDES = ("jaxrft", "matmuls", "whole matmuls", "naive")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    machine = describe_machine(PACKAGES)
    for name, value in DEFAULTS.get(machine["device"]["platform"], DEFAULTS["gpu"]).items():
        setattr(options, name, getattr(options, name) or value)
    import step_shapes

    ceilings = {dtype: step_shapes.matmul_ceiling(dtype, options.ceiling_size) for dtype in options.dtypes}
    cases = []
    for case in make_cases(options):
        cases.append(measure(case, options, ceilings[case["dtype"]]["flops_per_second"]))
        print(*(line for line in map("  ".join, rows(cases[-1]))), sep="\n", file=sys.stderr, flush=True)
    report = make_report("projection.py", argv, machine, options, goal=GOAL, matmul_ceilings=ceilings, cases=cases)
    print(aligned(COLUMNS, [row for case in cases for row in rows(case)]))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="that are projected at once")
    parser.add_argument("--hidden", type=int, nargs="+", help="hidden sizes")
    parser.add_argument("--vocab", type=int, default=151936, help="default: 151936, Qwen2.5's")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of the kernel")
    parser.add_argument("--kernels", nargs="+", choices=("tied", "untied"), default=["tied", "untied"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side (default: 5)")
    parser.add_argument("--ceiling-size", type=int, help="of the ceiling's matrices; default: 1024, on a GPU 8192")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats takes at least 1")
    return options


def make_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = itertools.product(options.dtypes, options.hidden, options.tokens, options.kernels, (False, True))
    return [
        {
            "tokens": tokens,
            "hidden": hidden,
            "vocab": options.vocab,
            "dtype": dtype,
            "param_dtype": options.param_dtype,
            "tied": kernel == "tied",
            "backward": backward,
        }
        for dtype, hidden, tokens, kernel, backward in cases
    ]


def measure(case: dict[str, Any], options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """A case's record; a side that fails, for lack of memory say, has an ``error``."""
    import jax
    import projection_sides

    from jaxrft.models.logit_chunks import chunk_size

    names = ("tokens", "hidden", "vocab", "dtype", "param_dtype", "tied")
    arguments = jax.block_until_ready(projection_sides.inputs(*(case[name] for name in names)))
    functions = projection_sides.functions(case["tied"], case["backward"])
    sides: dict[str, dict[str, Any]] = {name: {"all_seconds": []} for name in options.sides}
    programs = {}
    for name, side in sides.items():
        try:
            programs[name] = jax.jit(functions[name]).lower(*arguments).compile()
            memory = programs[name].memory_analysis()
            side |= {"temporary_bytes": memory.temp_size_in_bytes, "result_bytes": memory.output_size_in_bytes}
            jax.block_until_ready(programs[name](*arguments))
        except Exception as error:
            side["error"] = f"{type(error).__name__}: {error}"[:1000]
    for name in [name for name in programs if "error" not in sides[name]] * options.repeats:
        start = time.perf_counter()
        jax.block_until_ready(programs[name](*arguments))
        sides[name]["all_seconds"].append(time.perf_counter() - start)
    flops = 2 * case["tokens"] * case["hidden"] * case["vocab"] * (4 if case["backward"] else 1)
    for side in sides.values():
        if "error" not in side:
            seconds = statistics.median(side["all_seconds"])
            side |= {"seconds": seconds, "fastest_seconds": min(side["all_seconds"])}
            side["utilisation"] = flops / seconds / ceiling
    for side in sides.values():
        if "seconds" in side and "seconds" in sides.get("matmuls", {}):
            side["over_matmuls"] = side["seconds"] / sides["matmuls"]["seconds"]
            side["fastest_over_matmuls"] = side["fastest_seconds"] / sides["matmuls"]["fastest_seconds"]
    return case | {"chunk": chunk_size(case["tokens"], case["vocab"]), "flops": flops, "sides": sides}


COLUMNS = (
    "tokens", "hidden", "vocab", "dtype", "kernel", "pass", "side", "seconds", "x matmuls", "x fastest", "utilisation",
    "temporary MiB", "results MiB",
)  # fmt: skip


def rows(case: dict[str, Any]) -> list[list[str]]:
    start = [str(case[name]) for name in ("tokens", "hidden", "vocab", "dtype")]
    start += ["tied" if case["tied"] else "untied", "with gradient" if case["backward"] else "forward"]
    found = []
    for name, side in case["sides"].items():
        if "error" in side:
            found.append([*start, name, "failed: " + side["error"].splitlines()[0][:100]])
            continue
        ratios = [f"{side[key]:.3f}" if key in side else "-" for key in ("over_matmuls", "fastest_over_matmuls")]
        memory = [f"{side[key] / 2**20:.1f}" for key in ("temporary_bytes", "result_bytes")]
        found.append([*start, name, f"{side['seconds']:.4f}", *ratios, f"{side['utilisation']:.3f}", *memory])
    return found


if __name__ == "__main__":
    main()
