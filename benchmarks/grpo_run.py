"""One case of benchmarks/grpo_step.py: its sides are started, take turns, and are compared."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import grpo_case
from grpo_side import Side, SideError, make_model

PEERS = ("trl", "tunix")
VLLM_CPU_CHANNELS = 32


def run_case(case: grpo_case.Case, options: argparse.Namespace, platform: str) -> dict[str, Any]:
    """One case's record; what fails is written with its error, and the other sides go on."""
    result: dict[str, Any] = {"case": dataclasses.asdict(case), "sides": {}}
    pythons = {"jaxrft": sys.executable} | {peer: getattr(options, peer) for peer in PEERS if getattr(options, peer)}
    # Its trainer runs in this environment.
    pythons |= {"jaxrft_vllm": sys.executable} if options.vllm else {}
    settings = settings_of(pythons, options, platform)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_model(case, folder / "model")
        running: dict[str, Side] = {}
        for side, python in pythons.items():
            try:
                check_heads(side, case, platform)
                running[side], found = start(side, python, case, folder, options.starts, settings[side])
                stack.callback(running[side].close)
            except SideError as error:
                found = {"error": str(error)}
            result["sides"][side] = found
        for side, steps in take_turns(running, options).items():
            result["sides"][side] |= summary(steps, case) if isinstance(steps, list) else {"error": steps}
    return result | ratios(result["sides"])


def check_heads(side: str, case: grpo_case.Case, platform: str) -> None:
    """Spares a server's start that fails."""
    channels = case.model["hidden_size"] // case.model["num_attention_heads"]
    if side == "jaxrft_vllm" and platform == "cpu" and channels < VLLM_CPU_CHANNELS:
        raise SideError(f"vLLM on a CPU takes heads of {VLLM_CPU_CHANNELS} channels at least, not {channels}")


def settings_of(sides: Collection[str], options: argparse.Namespace, platform: str) -> dict[str, dict[str, Any]]:
    """What each side's program is told beside the case."""
    fraction = options.memory_fraction
    if fraction is None and platform != "cpu" and len(sides) > 1:
        # The peers', the second trainer's and its server's: all hold their memory while they wait.
        fraction = 0.25 if "jaxrft_vllm" in sides else 0.5
    own = {"memory_fraction": fraction, "vllm": None}
    return {
        "jaxrft": own,
        "jaxrft_vllm": own | {"vllm": options.vllm},
        "trl": {"param_dtype": options.trl_param_dtype, "platform": platform},
        "tunix": {"platform": platform},
    }


def start(
    name: str, python: str, case: grpo_case.Case, folder: Path, starts: int, settings: dict[str, Any]
) -> tuple[Side, dict[str, Any]]:
    """A side after its first step; how long that took in this process, and in those before it."""
    first: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for number in range(starts):
        cache = folder / f"cache-{name}-{number}"
        # torch compiles nothing: a second start would be like the first.
        for kind in ("warm",) if name == "trl" else ("cold", "warm"):
            side = Side(name, python, case, folder, cache, **settings)
            try:
                answer = side.turn()
            except BaseException:
                side.close()
                raise
            compiled = {"compiled": answer["compiled"]} if "compiled" in answer else {}
            first[kind].append({"seconds": side.seconds_to_step, "ready": side.seconds_to_ready, **compiled})
            if kind == "cold" or number < starts - 1:
                side.close()
    said = {key: answer[key] for key in ("threads", "versions", "device") if key in answer}
    return side, {"first_step": first} | said


def take_turns(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, list[dict[str, Any]] | str]:
    """All steps of each side, in turns, those of the warm-up left out; or why it ended."""
    found: dict[str, list[dict[str, Any]] | str] = {name: [] for name in sides}
    for number in range(options.warm_up - 1 + options.repeats):
        for name, side in sides.items():
            steps = found[name]
            if isinstance(steps, str):
                continue
            try:
                answer = side.turn()
            except SideError as error:
                found[name] = str(error)
                continue
            if number >= options.warm_up - 1:
                steps.append(answer)
    return found


def summary(steps: list[dict[str, Any]], case: grpo_case.Case) -> dict[str, Any]:
    seconds = [step["seconds"] for step in steps]
    median = statistics.median(seconds)
    phases = {name: statistics.median(step["phases"][name] for step in steps) for name in steps[0]["phases"]}
    phases["other"] = statistics.median(step["seconds"] - sum(step["phases"].values()) for step in steps)
    compiled = sum(step.get("compiled", {}).get("programs", 0) for step in steps)
    return {
        "seconds": median,
        "fastest_seconds": min(seconds),
        "step_seconds": seconds,
        "tokens_per_second": case.samples * case.new_tokens / median,
        "phases": phases,
        "compiled_in_timed_steps": compiled,
    }


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    found = {}
    ours = sides["jaxrft"]
    for name, theirs in sides.items():
        if name != "jaxrft" and "seconds" in ours and "seconds" in theirs:
            found[f"speed_over_{name}"] = theirs["seconds"] / ours["seconds"]
            found[f"fastest_over_{name}"] = theirs["fastest_seconds"] / ours["fastest_seconds"]
    return found
