"""What calling rewards while completions are generated saves (``rewards.overlap``).

    python benchmarks/reward_overlap.py --output reward_overlap.json
    python benchmarks/reward_overlap.py --shape 0.5B --dtype bfloat16 --param-dtype bfloat16 --prompts 64 --slots 128

A rollout of random prompts by the native engine, in a few turns of as many completions as there are slots, and a reward
that asks a service: an async function, whose service answers for one completion in --latency seconds, for --at-a-time
of them at once. Rollout and rewards are those of a run; nothing is trained. All ways take turns:

rollout          the same rollout with a reward that answers at once
rewards          the service's answers for all completions by themselves
one by one       rollout, then rewards: ``overlap: false``
overlapped       rewards are called for the groups that have ended: ``overlap: true``
seconds          median of the repeats; all_seconds has each
hidden           the seconds that overlapping saves beside one by one, over those of the rewards alone or of the rollout
                 alone, whichever are fewer: no more can be saved
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import step_shapes
from columns import aligned
from machine import describe_machine, make_report, settle

from jaxrft import models
from jaxrft.data.records import Prompt
from jaxrft.rewards.combine import RewardSet
from jaxrft.rollout import NativeEngine, SamplingParams
from jaxrft.tracking import Console
from jaxrft.tracking.timing import PhaseTimer
from jaxrft.training.collector import Collector
from jaxrft.training.phases import Phases

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    engine = make_engine(options)
    cases = [measure(engine, latency, options) for latency in options.latency]
    report = make_report("reward_overlap.py", argv, describe_machine(PACKAGES), options, cases=cases)
    print(aligned(COLUMNS, map(cells, cases)))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=step_shapes.SHAPES, default="small", help="of the model (default: small)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--prompts", type=int, default=32, help="of a rollout (default: 32)")
    parser.add_argument("--group", type=int, default=8, help="completions of each (default: 8)")
    parser.add_argument("--slots", type=int, default=64, help="completions generated at once (default: 64)")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.02, 0.1], help="seconds of one answer (default: 0.02 0.1)"
    )
    parser.add_argument("--at-a-time", type=int, default=16, help="answers of the service (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (default: 5)")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if min(options.prompts, options.group, options.slots, options.at_a_time, options.repeats) < 1:
        parser.error("--prompts, --group, --slots, --at-a-time and --repeats take at least 1")
    return options


class Words:
    """A tokenizer, as far as a collector needs one."""

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


class Service:
    """The reward: one number for each completion, each after ``latency`` seconds.

    Args:
        latency: seconds of one answer; 0 answers at once.
        at_a_time: answers that are given at the same time, over all calls.
    """

    __name__ = "service"

    def __init__(self, latency: float, at_a_time: int):
        self._latency, self._room = latency, asyncio.Semaphore(at_a_time)

    async def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return list(await asyncio.gather(*map(self._answer, completions)))

    async def _answer(self, text: str) -> float:
        if self._latency:
            async with self._room:
                await asyncio.sleep(self._latency)
        return float(len(text))


def make_engine(options: argparse.Namespace) -> NativeEngine:
    length = options.prompt_length + options.response_length
    fields = step_shapes.hf_config(options.shape, length)
    model = models.from_config(fields, dtype=options.dtype, param_dtype=options.param_dtype)
    return NativeEngine(model, max_slots=options.slots, max_length=length)


def vocabulary(options: argparse.Namespace) -> int:
    """Tokens that prompts are drawn from."""
    return step_shapes.hf_config(options.shape, options.prompt_length)["vocab_size"]


def measure(engine: NativeEngine, latency: float, options: argparse.Namespace) -> dict[str, Any]:
    """All ways for one latency, in turns."""
    tokens = (
        np.random.default_rng(0).integers(vocabulary(options), size=(options.prompts, options.prompt_length)).tolist()
    )
    prompts = [Prompt(i, f"prompt {i}", f"prompt {i}", ids, {}) for i, ids in enumerate(tokens)]
    sampling = SamplingParams(max_tokens=options.response_length, ignore_eos=True)
    texts = ["1"] * (options.prompts * options.group)

    def rollout(latency: float, overlap: bool) -> Callable[[], Any]:
        rewards = RewardSet([Service(latency, options.at_a_time)])
        collector = Collector(engine, Words(), rewards, overlap)
        phases = Phases(Console(False, file=io.StringIO()), PhaseTimer(), check=lambda: None)
        return lambda: collector.collect(prompts, options.group, sampling, 0, phases)

    def answers() -> None:
        asyncio.run(Service(latency, options.at_a_time)(texts))

    ways = {
        "rollout": rollout(0.0, overlap=False),
        "rewards": answers,
        "one by one": rollout(latency, overlap=False),
        "overlapped": rollout(latency, overlap=True),
    }
    # Compiles.
    ways["rollout"]()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            settle()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {"latency": latency, "completions": len(texts)} | compared(seconds)


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Each way's median, and how much of what could be saved was."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    most = min(medians["rollout"], medians["rewards"])
    return {
        "sides": {name: {"seconds": medians[name], "all_seconds": seconds[name]} for name in seconds},
        "hidden": (medians["one by one"] - medians["overlapped"]) / most,
    }


COLUMNS = ("latency", "rollout s", "rewards s", "one by one s", "overlapped s", "hidden")


def cells(case: dict[str, Any]) -> list[str]:
    times = [f"{side['seconds']:.3f}" for side in case["sides"].values()]
    return [f"{case['latency']:g}", *times, f"{case['hidden']:.2f}"]


if __name__ == "__main__":
    main()
