"""Speed of attention to a generating engine's caches, which get a new token, beside the time that reading them takes.

    python benchmarks/decode_attention.py --output decode_attention.json
    python benchmarks/decode_attention.py --shapes 1.5B --slots 256 --tiles 32x4x3 64x4x2 --splits 1 2

A case is the newest token of each slot and a cache of ``--keys`` places for each, of which a slot has filled
``--filled``, a quarter more or less. A turn is one program that goes ten times through ``--layers`` layers, each with
caches of its own, as otherwise they would still be in the GPU's own caches from the last time; the fastest turn counts.
Beside the kernel as it is used runs the product of all keys of all places (dense). With ``--tiles`` the kernel runs
with others too, each of keys, warps and stages; with ``--splits`` also where so many instances share a slot's keys. On
a CPU it runs interpreted.

gap         of the first layer's result from the first kernel's, as a share of the largest number; infinite where the
            newest token is not in the cache
over_floor  the time over that in which the filled part can be read at the speed of a copy, measured here
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bandwidth
import jax
import jax.numpy as jnp
import numpy as np
from attention import SHAPES
from columns import aligned
from machine import describe_machine, make_report

from jaxrft.models.attention import attend_cached, cache_mask
from jaxrft.models.attention.triton_decode import DecodeTile, extend_triton_decode

PACKAGES = ("jaxrft", "jax", "jaxlib", "numpy")
# Through all layers, in one program: else the host's time would show.
TURNS = 10
COLUMNS = ("shape", "slots", "kernel", "us a layer", "over the floor", "gap")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    machine, copy = describe_machine(PACKAGES), bandwidth.copy_bandwidth()
    cases = [
        run_case(options, copy["bytes_per_second"], shape, slots)
        for shape, slots in itertools.product(options.shapes, options.slots)
    ]
    report = make_report("decode_attention.py", argv, machine, options, copy=copy, cases=cases)
    print(aligned(COLUMNS, [line for case in cases for line in lines(case)]))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5B"])
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--keys", type=int, default=384, help="places of a cache")
    parser.add_argument("--filled", type=int, default=256, help="of them, on average")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tiles", type=tile, nargs="+", default=[], help="further ones; see above")
    parser.add_argument("--splits", type=int, nargs="+", default=[], help="with each of the tiles too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    options = parser.parse_args(argv)
    if options.filled < 4 or options.filled + options.filled // 4 > options.keys:
        parser.error(
            f"--filled: takes 4 to {options.keys * 4 // 5}, of which a quarter more goes into {options.keys} places"
        )
    return options


def tile(text: str) -> str:
    """Three numbers, as they are written."""
    if len([int(number) for number in text.split("x")]) != 3:
        raise ValueError(text)
    return text


def run_case(options: argparse.Namespace, speed: float, shape: str, slots: int) -> dict[str, Any]:
    heads, kv_heads, head_dim = SHAPES[shape]
    rng = np.random.default_rng(0)
    filled = rng.integers(options.filled - options.filled // 4, options.filled + options.filled // 4 + 1, slots)
    mask = cache_mask(jnp.asarray(filled - 1, jnp.int32))
    key, *keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(key, (slots, 1, heads, head_dim), options.dtype)
    new = tuple(jax.random.normal(k, (slots, kv_heads, 1, head_dim), options.dtype) for k in keys)
    width = 2 * kv_heads * head_dim * query.dtype.itemsize
    known: dict[str, Any] = {"shape": shape, "slots": slots, "bytes": int(filled.sum()) * width}
    expected, found = None, {}
    for name, extend in kernels(options).items():
        # New ones for each kernel: the newest token is not there, nor gone with a kernel that fails.
        caches = make_caches(options, (slots, kv_heads, options.keys, head_dim))
        try:
            seconds, first, there = measure(options, extend, query, new, caches, mask)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        expected = first if expected is None else expected
        gap = float(np.abs(first - expected).max() / np.abs(expected).max()) if there else float("inf")
        found[name] = {"seconds": seconds, "over_floor": seconds * speed / known["bytes"], "gap": gap}
        print(name, found[name], file=sys.stderr, flush=True)
    return known | {"kernels": found}


def make_caches(options: argparse.Namespace, shape: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(jax.random.key(1), 2 * options.layers)
    parts = [jax.random.normal(key, shape, options.dtype) for key in keys]
    return list(zip(parts[::2], parts[1::2]))


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """What runs, by name; what the others are compared with comes first."""
    found: dict[str, Any] = {"dense": functools.partial(attend_cached, window=options.keys)}
    found["usual"] = extend_triton_decode
    for text, splits in itertools.product(options.tiles, (None, *options.splits)):
        name = text if splits is None else f"{text}/{splits}"
        cut = DecodeTile(*map(int, text.split("x")))
        found[name] = functools.partial(extend_triton_decode, tile=cut, splits=splits)
    return found


def measure(
    options: argparse.Namespace, extend: Any, query: Any, new: Any, caches: Any, mask: Any
) -> tuple[float, np.ndarray, bool]:
    """Seconds of a layer, the first one's result, and whether its cache has the newest token."""

    def layers(_: Any, carry: Any) -> Any:
        query, caches = carry
        after = []
        for cache in caches:
            # Each layer waits for the one before.
            query, cache = extend(query, new, cache, mask)
            after.append(cache)
        return query, after

    def turn(caches: Any, query: Any) -> Any:
        return jax.lax.fori_loop(0, TURNS, layers, (query, caches))

    first, cache = jax.jit(extend)(query, new, caches[0], mask)
    places = (jnp.arange(len(query)), slice(None), mask.last[:, 0])
    there = all(bool(jnp.array_equal(part[places], fresh[:, :, 0])) for part, fresh in zip(cache, new))
    program = jax.jit(turn, donate_argnums=0).lower(caches, query).compile()
    seconds = []
    for _ in range(1 + options.repeats):
        start = time.perf_counter()
        out, caches = program(caches, query)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / TURNS / options.layers)
    return min(seconds[1:]), np.asarray(first, np.float32), there


def lines(case: dict[str, Any]) -> list[list[str]]:
    out = []
    for kernel, known in case["kernels"].items():
        start = [case["shape"], str(case["slots"]), kernel]
        if "error" in known:
            out.append([*start, "not run: " + known["error"].splitlines()[0][:80]])
        else:
            out.append([*start, f"{1e6 * known['seconds']:.1f}", f"{known['over_floor']:.2f}", f"{known['gap']:.1e}"])
    return out


if __name__ == "__main__":
    main()
