"""What each recipe reaches on the quick start's task, in the same number of steps from the same start.

    python benchmarks/recipes.py run --output benchmarks/results/recipes.json
    python benchmarks/recipes.py run --recipes grpo gspo --seeds 0 --steps 50 --output some.json
    python benchmarks/recipes.py table benchmarks/results/recipes.json

For each seed a model is made and warmed up once, as configs/quickstart.yaml says. Each recipe trains it from there,
as its file in configs/algorithms says, on the same prompts. `table` prints the result as Markdown: it stands in
docs/algorithms/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "optax", "numpy")
# Its critic is not part of this version.
WITHOUT = {"ppo"}


def main() -> None:
    arguments = parse_arguments()
    if arguments.what == "table":
        print(table(json.loads(arguments.result.read_text(encoding="utf-8"))), end="")
    else:
        measure(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run", help="train, and write what came of it")
    run.add_argument("--recipes", nargs="+", help="default: all that can be trained")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: %(default)s)")
    run.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on cores of its own")
    run.add_argument("--output", type=Path, required=True, help="file for the JSON report")
    commands.add_parser("table", help="print a report as a table").add_argument("result", type=Path)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    names = arguments.recipes or [p.stem for p in sorted((ROOT / "configs/algorithms").glob("*.yaml"))]
    names = [name for name in names if name not in WITHOUT]
    start = time.time()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
        arguments.jobs, mp_context=context, initializer=take_cores, initargs=(context.Value("i", 0), arguments.jobs)
    ) as pool:  # fmt: skip
        warm = {seed: pool.submit(warm_up, seed, folder) for seed in arguments.seeds}
        models = {seed: future.result() for seed, future in warm.items()}
        runs = [
            pool.submit(train, name, seed, models[seed], arguments.steps, folder)
            for seed in arguments.seeds
            for name in names
        ]
        rows = []
        for future in runs:
            rows.append(future.result())
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "command": shlex.join(["python", "benchmarks/recipes.py", *sys.argv[1:]]),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - start),
        "steps": arguments.steps,
        "machine": {"platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "device": "cpu"},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def take_cores(counter: Any, jobs: int) -> None:
    """Pins a worker to its share of the cores: runs side by side then do not share threads."""
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[number % jobs :: jobs]) or set(cores))


def warm_up(seed: int, folder: str) -> str:
    """A model of the quick start after its supervised stage: one step of RL at a rate of 0 changes nothing."""
    target = f"{folder}/warm-{seed}"
    settings = [f"seed={seed}", "max_steps=1", "learning_rate=0", f"output_dir={target}", "save_steps=null"]
    execute("configs/quickstart.yaml", settings)
    return f"{target}/final"


def train(name: str, seed: int, model: str, steps: int, folder: str) -> dict[str, Any]:
    """One recipe from there on."""
    target = f"{folder}/{name}-{seed}"
    settings = [
        f"seed={seed}", f"max_steps={steps}", f"output_dir={target}", "save_steps=null", "eval_steps=null",
        f"model.path={model}", "model.scratch=null", "model.tokenizer=null", "warm_start.max_steps=0",
        "log_completions=false",
    ]  # fmt: skip
    begun = time.time()
    records = execute(f"configs/algorithms/{name}.yaml", settings)
    held_out = [r["eval/reward"] for r in records if r.get("eval/reward") is not None]
    steps_made = [r for r in records if "loss" in r]
    return {
        "recipe": name,
        "seed": seed,
        "before": held_out[0],
        "after": held_out[-1],
        "updates": steps_made[-1]["step"],
        "epochs": steps_made[-1]["epoch"],
        "entropy": steps_made[-1]["entropy"],
        "seconds": round(time.time() - begun, 1),
    }


def execute(config: str, settings: list[str]) -> list[dict[str, Any]]:
    """Runs the command line in this process and returns its records."""
    from jaxrft.tracking import read_metrics
    from jaxrft.train import main as command

    target = next(s.partition("=")[2] for s in settings if s.startswith("output_dir="))
    with quiet():
        code = command([str(ROOT / config), *settings, "tracking.progress=false"])
    if code != 0:
        raise RuntimeError(f"{config} {' '.join(settings)} ended with {code}")
    return read_metrics(Path(target) / "metrics.jsonl")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def table(report: dict[str, Any]) -> str:
    """Markdown: the held-out reward of each recipe and seed, best mean first."""
    seeds = sorted({run["seed"] for run in report["runs"]})
    by_recipe: dict[str, dict[int, dict[str, Any]]] = {}
    for run in report["runs"]:
        by_recipe.setdefault(run["recipe"], {})[run["seed"]] = run
    before = {run["seed"]: run["before"] for run in report["runs"]}
    lines = [
        "| Recipe | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "| --- |" + " ---: |" * (len(seeds) + 1),
        "| *start* | " + " | ".join(f"{before[seed]:.3f}" for seed in seeds) + f" | {mean(before.values()):.3f} |",
    ]
    for name, runs in sorted(by_recipe.items(), key=lambda item: -mean(r["after"] for r in item[1].values())):
        cells = [f"{runs[seed]['after']:.3f}" if seed in runs else "" for seed in seeds]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {mean(r['after'] for r in runs.values()):.3f} |")
    return "\n".join(lines) + "\n"


def mean(values: Any) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
