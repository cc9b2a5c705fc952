"""Speed of the native engine, beside ``transformers.generate`` where torch is installed.

    python benchmarks/rollout.py --output rollout.json
    python benchmarks/rollout.py --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --concurrency 1 64 256

Runs on a CPU and on a GPU. Without --model, both sides run a Qwen2 of the given shape with random
weights. Every completion has the full response length: end-of-sequence tokens are ignored. The two
sides take turns, and the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from machine import describe_machine

from jaxrft.models import Decoder, DecoderSpec, load
from jaxrft.models.spec import RopeSpec
from jaxrft.rollout import NativeEngine, Request, SamplingParams

PACKAGES = ("jaxrft", "jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def main() -> None:
    arguments = parse_arguments()
    model, vocab_size = build_model(arguments)
    peer = None if arguments.no_peer else build_peer(arguments)
    cases = []
    for concurrency in arguments.concurrency:
        for prompt_length in arguments.prompt_length:
            for response_length in arguments.response_length:
                shape = {"concurrency": concurrency, "prompt_length": prompt_length, "response_length": response_length}
                cases.append(shape | run_case(arguments, model, vocab_size, peer, **shape))
                print(json.dumps(cases[-1]), flush=True)
    report = {
        "command": shlex.join(["python", "benchmarks/rollout.py", *sys.argv[1:]]),
        **describe_machine(PACKAGES),
        "options": vars(arguments),
        "cases": cases,
    }
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; default: random weights of the shape below")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64], help="completions asked for at once")
    parser.add_argument("--group", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[16], help="tokens")
    parser.add_argument("--response-length", type=int, nargs="+", default=[64], help="tokens")
    parser.add_argument("--max-slots", type=int, help="slots of the engine; default: the concurrency")
    parser.add_argument("--decode-chunk", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--output", help="file for the JSON report")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> tuple[nnx.Module, int]:
    if arguments.model:
        model = load(arguments.model, dtype=arguments.dtype)
    else:
        spec = DecoderSpec(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            num_kv_heads=arguments.kv_heads,
            head_dim=arguments.hidden_size // arguments.heads,
            max_positions=4096,
            rope=RopeSpec(),
            tie_embeddings=True,
            qkv_bias=True,
        )
        model = Decoder(spec, dtype=jax.numpy.dtype(arguments.dtype), rngs=nnx.Rngs(0))
    return model, model.spec.vocab_size


def build_peer(arguments: argparse.Namespace) -> Any | None:
    """The same model for ``transformers.generate``, or None where torch is missing."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        return None
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        config = Qwen2Config(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.intermediate_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.kv_heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = Qwen2ForCausalLM(config).to(dtype)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def run_case(arguments, model, vocab_size, peer, *, concurrency, prompt_length, response_length) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, vocab_size, (max(1, concurrency // arguments.group), prompt_length))
    slots = arguments.max_slots or concurrency
    with NativeEngine(
        model, max_slots=slots, max_length=prompt_length + response_length, decode_chunk=arguments.decode_chunk
    ) as engine:
        sides = {"jaxrft": native_side(engine, prompts, response_length, arguments)}
        if peer is not None:
            sides["transformers"] = transformers_side(peer, prompts, response_length, arguments)
        first = {name: timed(side) for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, side in sides.items():
                seconds[name].append(timed(side))
        compilations = engine.compilations
    tokens = len(prompts) * arguments.group * response_length
    result: dict[str, Any] = {name: summary(seconds[name], first[name], tokens, response_length) for name in sides}
    result["jaxrft"]["compilations"] = compilations
    if "transformers" in sides:
        ratio = result["jaxrft"]["tokens_per_second"] / result["transformers"]["tokens_per_second"]
        result["jaxrft_over_transformers"] = round(ratio, 3)
    return result


def native_side(engine: NativeEngine, prompts: np.ndarray, response_length: int, arguments) -> Callable[[], None]:
    requests = [Request(prompt_ids=prompt.tolist(), n=arguments.group) for prompt in prompts]
    sampling = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_tokens=response_length,
        ignore_eos=True,
    )

    def run() -> None:
        for completion in engine.generate(requests, sampling):
            assert len(completion.token_ids) == response_length

    return run


def transformers_side(peer: Any, prompts: np.ndarray, response_length: int, arguments) -> Callable[[], None]:
    import torch

    tokens = torch.tensor(prompts, device=peer.device)
    options = {"max_new_tokens": response_length, "min_new_tokens": response_length, "pad_token_id": 0}
    options |= {"num_return_sequences": arguments.group} if arguments.group > 1 else {}
    if arguments.temperature == 0:
        options |= {"do_sample": False}
    else:
        options |= {"do_sample": True, "temperature": arguments.temperature}
        options |= {"top_k": arguments.top_k, "top_p": arguments.top_p}

    def run() -> None:
        with torch.no_grad():
            result = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert result.cpu().shape[1] == prompts.shape[1] + response_length

    return run


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
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


if __name__ == "__main__":
    main()
