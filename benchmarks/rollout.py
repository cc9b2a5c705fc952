"""Speed of the native engine, beside ``transformers.generate`` where torch is installed, and beside vLLM.

    python benchmarks/rollout.py --output rollout.json
    python benchmarks/rollout.py --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --concurrency 1 64 256
    python benchmarks/rollout.py --shape 1.5B --dtype bfloat16 --concurrency 256 --output rollout.json
    python benchmarks/rollout.py --vllm ~/vllm/bin/python --concurrency 64 --output rollout.json
    python benchmarks/rollout.py --shape 1.5B --dtype bfloat16 --fp8 --concurrency 1 64 --output rollout.json

Runs on a CPU and on a GPU. Without --model, all sides run a Qwen2 of the given shape with random
weights. With --vllm a server is started by that interpreter and fed with the native engine's very
weights; it is asked as a run would ask it. Every completion has the full response length:
end-of-sequence tokens are ignored. The sides take turns at the same prompts, which are new in each
turn, so that nobody has them in a cache, and the median of the repeats counts.

A step is one token of every completion. ms_per_step has the prefill in it; ms_per_decode_step has not:
each side is timed in each turn for a single token of every completion too, and that time is taken off.
floor_ratio and decode_floor_ratio are these times over that in which the device could read the weights
and the filled part of the caches at the speed of a plain copy, measured in the same process: what a step
takes at least where memory is the limit, as it is on a GPU.
With --fp8 the native engine runs a second time, with kernels in 8 bits; its floor is that of its own bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bandwidth
import numpy as np
import rollout_sides as sides_of
import step_shapes
from flax import nnx
from kernel_times import profile
from machine import describe_machine, make_report, settle
from vllm_peer import vllm_engine

from jaxrft.models import Decoder
from jaxrft.models.attention.choice import CHOICES

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy", "torch", "transformers")
# Names in the report, each side over those after it.
RATIOS = (("jaxrft", "transformers"), ("jaxrft", "vllm"), ("vllm", "transformers"), ("jaxrft_fp8", "jaxrft"))


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    if arguments.vllm:
        # The server needs memory of the same GPU. On a CPU it would leave a core alone, which the others do not.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    model = sides_of.build_model(arguments)
    peer = None if arguments.no_peer else sides_of.build_peer(arguments)
    machine = describe_machine(PACKAGES)
    copy = bandwidth.copy_bandwidth()
    cases = []
    with contextlib.ExitStack() as stack:
        vllm = None
        if arguments.vllm:
            vllm, machine["versions"]["vllm"] = stack.enter_context(start_vllm(arguments, model))
            vllm.update_weights(nnx.state(model, nnx.Param), 0)
        for concurrency in arguments.concurrency:
            for prompt_length in arguments.prompt_length:
                for response_length in arguments.response_length:
                    shape = {
                        "concurrency": concurrency, "prompt_length": prompt_length, "response_length": response_length
                    }  # fmt: skip
                    measured = run_case(arguments, model, peer, vllm, **shape)
                    cases.append(shape | measured | floor(arguments, model, copy, measured, **shape))
                    print(json.dumps(cases[-1]), flush=True)
    make_report("rollout.py", argv, machine, arguments, copy=copy, cases=cases)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; default: random weights of the shape below")
    parser.add_argument("--shape", choices=step_shapes.SHAPES, help="of a random model, in place of the options below")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of the native engine's parameters"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64], help="completions asked for at once")
    parser.add_argument("--group", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[16], help="tokens")
    parser.add_argument("--response-length", type=int, nargs="+", default=[64], help="tokens")
    parser.add_argument("--max-slots", type=int, help="slots of the engine; default: the concurrency")
    parser.add_argument("--decode-chunk", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--attention", choices=CHOICES, default="auto", help="of the native engine (default: auto)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="profile a turn of ours (see kernel_times.py)")
    parser.add_argument("--fp8", action="store_true", help="run the native engine with quantization=fp8 too")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--vllm", metavar="PYTHON", help="has vLLM: run it too (heads of 32 channels at least)")
    parser.add_argument("--vllm-memory", type=float, default=0.4, help="share of a GPU's memory (default: 0.4)")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    return parser.parse_args(argv)


def start_vllm(arguments: argparse.Namespace, model: Decoder) -> Any:
    """One server for all cases."""
    return vllm_engine(
        arguments.vllm,
        model,
        dtype=arguments.dtype,
        max_length=max(arguments.prompt_length) + max(arguments.response_length),
        max_sequences=arguments.max_slots or max(arguments.concurrency),
        temperature=arguments.temperature,
        gpu_memory=arguments.vllm_memory,
    )


def native_sides(arguments: argparse.Namespace) -> dict[str, str]:
    """How the native engine runs, by the side's name."""
    return {"jaxrft": "none"} | ({"jaxrft_fp8": "fp8"} if arguments.fp8 else {})


def run_case(arguments, model, peer, vllm, *, concurrency, prompt_length, response_length) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape = (max(1, concurrency // arguments.group), prompt_length)
    slots = arguments.max_slots or concurrency
    length = prompt_length + response_length
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, quantization in native_sides(arguments).items():
            engine = sides_of.native_engine(model, slots, length, arguments, quantization)
            engines[name] = stack.enter_context(engine)
        sides, first_tokens = (all_sides(engines, vllm, peer, n, arguments) for n in (response_length, 1))
        turns, first_turns = [], []
        for _ in range(1 + arguments.repeats):
            for times, run in ((turns, sides), (first_turns, first_tokens)):
                # Other prompts: nobody has them in a cache.
                prompts = rng.integers(0, model.spec.vocab_size, shape)
                times.append({name: timed(side, prompts) for name, side in run.items()})
        if arguments.trace:
            for name in engines:
                with profile(arguments.trace / f"{concurrency}-{prompt_length}-{response_length}-{name}"):
                    sides[name](prompts)
        compilations = {name: engine.compilations for name, engine in engines.items()}
    tokens = shape[0] * arguments.group * response_length
    first, *rest = turns
    result: dict[str, Any] = {
        name: summary([turn[name] for turn in rest], first[name], tokens, response_length)
        | decoding([turn[name] for turn in rest], [turn[name] for turn in first_turns[1:]], response_length)
        for name in sides
    }
    for name, count in compilations.items():
        result[name]["compilations"] = count
    for one, other in RATIOS:
        if one in sides and other in sides:
            ratio = result[one]["tokens_per_second"] / result[other]["tokens_per_second"]
            result[f"{one}_over_{other}"] = round(ratio, 3)
    return result


def all_sides(engines, vllm, peer, response_length: int, arguments: argparse.Namespace) -> dict[str, sides_of.Side]:
    """All that generate, for so many tokens of each completion, by their names in the report."""
    engines = engines | ({} if vllm is None else {"vllm": vllm})
    sides = {name: sides_of.engine_side(engine, response_length, arguments) for name, engine in engines.items()}
    if peer is not None:
        sides["transformers"] = sides_of.transformers_side(peer, response_length, arguments)
    return sides


def floor(arguments, model, copy, measured, *, concurrency, prompt_length, response_length) -> dict[str, Any]:
    """The least time of a decode step, and each side's over it."""
    shape = {
        "completions": max(1, concurrency // arguments.group) * arguments.group,
        "slots": arguments.max_slots or concurrency,
        "prompt_length": prompt_length,
        "response_length": response_length,
        "dtype": arguments.dtype,
    }

    def least(**changed: str) -> dict[str, Any]:
        needed = bandwidth.decode_step_bytes(model.spec, **shape, **changed)
        return {"bytes": needed, "ms_per_step": 1000 * sum(needed.values()) / copy["bytes_per_second"]}

    floors = {"floor": least()}
    if arguments.fp8:
        floors["floor_fp8"] = least(kernel_dtype="float8_e4m3fn")
    ratios: dict[str, dict[str, float]] = {"floor_ratio": {}, "decode_floor_ratio": {}}
    for name, found in measured.items():
        if isinstance(found, dict):
            own = floors["floor_fp8" if name == "jaxrft_fp8" else "floor"]["ms_per_step"]
            ratios["floor_ratio"][name] = round(found["ms_per_step"] / own, 3)
            if "ms_per_decode_step" in found:
                ratios["decode_floor_ratio"][name] = round(found["ms_per_decode_step"] / own, 3)
    return floors | ratios


def timed(side: sides_of.Side, prompts: np.ndarray) -> float:
    settle()
    start = time.perf_counter()
    side(prompts)
    return time.perf_counter() - start


def summary(seconds: list[float], first: float, tokens: int, steps: int) -> dict[str, float]:
    """Median speed; a step is one token of every completion, prefill and waves included."""
    median = statistics.median(seconds)
    return {
        "seconds": round(median, 4),
        "fastest_seconds": round(min(seconds), 4),
        "first_call_seconds": round(first, 3),
        "tokens_per_second": round(tokens / median, 1),
        "ms_per_step": round(1000 * median / steps, 3),
    }


def decoding(seconds: list[float], first_tokens: list[float], steps: int) -> dict[str, float]:
    """A step's time without prefill: what all tokens take beyond the first, waves included; nothing of one token."""
    if steps == 1:
        return {}
    prefill = statistics.median(first_tokens)
    decode = (statistics.median(seconds) - prefill) / (steps - 1)
    return {"first_token_seconds": round(prefill, 4), "ms_per_decode_step": round(1000 * decode, 3)}


if __name__ == "__main__":
    main()
