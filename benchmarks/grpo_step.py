"""Speed of a whole GRPO step, from prompts to changed weights; beside TRL and tunix.

    python benchmarks/grpo_step.py --output grpo_step.json
    python benchmarks/grpo_step.py --trl ~/trl/bin/python --tunix ~/tunix/bin/python --output grpo_step.json
    python benchmarks/grpo_step.py --cases hidden256 --vllm ~/vllm/bin/python --output grpo_step.json
    python benchmarks/grpo_step.py --cases 0.5B --trl ~/trl/bin/python --repeats 3 --output grpo_step.json

Every side is a process of its own, run by its own interpreter, and trains as its users would have it train: jaxrft by
RLTrainer, TRL by GRPOTrainer with transformers' generate, tunix by GRPOLearner with its own sampler. With --vllm there
is a second jaxrft, which generates on a vLLM server of its own and hands its weights over. They take turns,
step by step, on the same cores: while one works, the others stand still. All start from the same random Qwen2, have the
same prompts and reward (the share of even tokens), and do the same: GRPO's loss, no reference, one update a rollout,
temperature 1, AdamW, clipped gradients. No completion ends early: each has all its tokens. Nothing is evaluated or
saved; jaxrft writes its metrics, as always.

seconds            of a step, the median of the timed ones; step_seconds has all
tokens_per_second  generated tokens over the whole step's seconds
phases             median seconds of rollout, rewards, training, and of jaxrft's hand-over of weights; other: the rest.
                   The peers' engines share the trainer's weights: there is nothing to hand over
first_step         seconds from the start of a process to the end of its first step, with an empty folder of compiled
                   programs (cold) and with a full one (warm); ready: those of them before the step, for imports and the
                   model. torch compiles nothing: its starts are all warm
speed_over_SIDE    that side's median seconds over jaxrft's; fastest_over_SIDE: the same of the fastest steps, which
                   other work on the machine disturbs least

Defaults follow the platform: a CPU gets hidden256 and quarter, a GPU 0.5B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpo_case
from columns import aligned
from grpo_run import run_case
from grpo_side import environment
from machine import make_report

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "optax", "numpy")
DEFAULTS = {"cpu": ["hidden256", "quarter"], "gpu": ["0.5B"]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    machine = describe()
    platform = machine["device"]["platform"]
    options.cases = options.cases or DEFAULTS.get(platform, DEFAULTS["gpu"])
    cases = []
    for name in options.cases:
        cases.append(run_case(grpo_case.CASES[name], options, platform))
        for row in rows(cases[-1]):
            print("  ".join(row), file=sys.stderr, flush=True)
    report = make_report("grpo_step.py", argv, machine, options, cases=cases)
    print(aligned(COLUMNS, [row for case in cases for row in rows(case)]))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=grpo_case.CASES)
    parser.add_argument("--trl", metavar="PYTHON", help="has TRL: run it too (scripts/peers_environment.sh makes one)")
    parser.add_argument("--tunix", metavar="PYTHON", help="has tunix: run it too")
    parser.add_argument("--vllm", metavar="PYTHON", help="has vLLM: run jaxrft with rollouts on its server too")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each side (default: 9)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them, the first included (default: 2)")
    parser.add_argument("--starts", type=int, default=1, help="cold and warm starts of each side (default: 1)")
    parser.add_argument(
        "--trl-param-dtype", choices=("float32", "bfloat16"), default="float32", help="jaxrft's are float32"
    )
    parser.add_argument(
        "--memory-fraction", type=float, help="of a GPU for jaxrft; default: 0.5 beside others, 0.25 with vLLM"
    )
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.warm_up < 1 or options.starts < 1:
        parser.error("--repeats, --warm-up and --starts take at least 1")
    return options


def describe() -> dict[str, Any]:
    """The machine, as a process sees it that then lets go of a GPU."""
    code = "import json, machine, sys; print(json.dumps(machine.describe_machine(sys.argv[1:])))"
    environ = environment(own=True)
    environ["PYTHONPATH"] += f":{Path(__file__).resolve().parent}"
    done = subprocess.run([sys.executable, "-c", code, *PACKAGES], check=True, stdout=subprocess.PIPE, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = (
    "case", "side", "s/step", "fastest", "tokens/s", "rollout", "rewards", "training", "weights", "other", "cold s",
    "warm s", "x jaxrft",
)  # fmt: skip


def rows(case: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: one a side."""
    found = []
    for name, side in case["sides"].items():
        start = [case["case"]["name"], name]
        if "error" in side:
            found.append([*start, "failed: " + side["error"][:150]])
            continue
        times = [side["seconds"], side["fastest_seconds"]]
        phases = [side["phases"].get(phase) for phase in ("rollout", "rewards", "training", "weights", "other")]
        first = [
            statistics.median(begun["seconds"] for begun in side["first_step"][kind])
            if side["first_step"][kind]
            else None
            for kind in ("cold", "warm")
        ]
        cells = [f"{seconds:.3f}" for seconds in times] + [f"{side['tokens_per_second']:.0f}"]
        cells += ["-" if value is None else f"{value:.3f}" for value in phases]
        cells += ["-" if value is None else f"{value:.1f}" for value in first]
        ratio = case.get(f"speed_over_{name}")
        found.append([*start, *cells, "-" if ratio is None else f"{ratio:.2f}"])
    return found


if __name__ == "__main__":
    main()
