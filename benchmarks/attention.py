"""Speed and memory of every implementation of attention that this device has, forward and with its gradient.

    python benchmarks/attention.py --output attention.json
    python benchmarks/attention.py --shapes 1.5B --lengths 8192 65536 --masks packed --dtype bfloat16

A case is one layer's attention over rows of a length: causal, with a sliding window, or packed with eight segments of
any length, which are as many as cuDNN's program for packed rows takes at any length. The implementations take turns,
and the median of the repeats counts. On a GPU each turn is ten calls, of which the last is waited for: a single one
would be the host's time as much as the GPU's. FLOPs are those of the scores that are seen: 4 x heads x head size for
each, and 2.5 times as many more for the gradient. Beside them torch's scaled_dot_product_attention, where torch is
installed (causal rows alone: it has no kernel for packed ones).
With ``--tiles`` Triton's kernels run with others too, each a line of its own: three tiles, of the forward, the query
gradient's and the key gradient's kernel, each of rows, step, warps and stages. On a CPU they run interpreted.

    python benchmarks/attention.py --kernels dense triton --tiles 128x64x8x3:128x32x8x3:128x64x8x3

Values and gradients of each are compared with whole scores, where these fit ``--dense-limit``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from columns import aligned
from machine import describe_machine, make_report, settle
from torch_device import torch_device

PACKAGES = ("jaxrft", "jax", "jaxlib", "numpy", "torch")
# Heads, key heads, head size.
SHAPES = {"small": (4, 2, 64), "0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "7B": (28, 4, 128)}
KERNELS = ("dense", "chunked", "cudnn", "triton")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": ["small"], "lengths": [128, 256, 512, 1024, 2048], "dtype": "float32", "tokens": 2048,
            "calls": 1},
    "gpu": {"shapes": ["0.5B", "1.5B"], "lengths": [1024, 2048, 8192, 16384, 65536], "dtype": "bfloat16",
            "tokens": 65536, "calls": 10},
}  # fmt: skip
# Forward, and with the gradient: so many calls, which are waited for.
Side = tuple[Callable[[int], Any], Callable[[int], Any]]
COLUMNS = ("shape", "mask", "rows", "length", "kernel", "forward ms", "with gradient ms", "TFLOP/s", "MiB", "gap")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    machine = describe_machine(PACKAGES)
    for name, value in DEFAULTS.get(machine["device"]["platform"], DEFAULTS["gpu"]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    cases = []
    for shape in options.shapes:
        for mask in options.masks:
            for length in options.lengths:
                cases.append(run_case(options, shape, mask, length))
                print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    report = make_report("attention.py", argv, machine, options, cases=cases)
    print(aligned(COLUMNS, [line for case in cases for line in lines(case)]))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--masks", nargs="+", default=["causal", "packed"], choices=("causal", "window", "packed"))
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--tiles", nargs="+", default=[], help="further ones for Triton's kernels; see above")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, help="of all rows together; at least one row")
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest rows of which whole scores are held")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, help="of a turn, one after the other (default: 1, on a GPU 10)")
    parser.add_argument("--no-peer", action="store_true", help="do not run torch")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    return parser.parse_args(argv)


def make_mask(kind: str, rows: int, length: int) -> tuple[Any, np.ndarray]:
    """The mask, and how many keys each query sees."""
    from jaxrft.models.attention import causal_mask

    rng, window, segments = np.random.default_rng(0), None, None
    if kind == "window":
        window = max(length // 8, 1)
    if kind == "packed":
        cuts = [np.sort(rng.choice(np.arange(1, length), min(7, length - 1), replace=False)) for _ in range(rows)]
        segments = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in cuts]).astype(np.int32)
    mask = causal_mask(length, window, segments)
    return mask, np.asarray(mask.last - mask.first + 1)


def run_case(options: argparse.Namespace, shape: str, kind: str, length: int) -> dict[str, Any]:
    import jax.numpy as jnp

    rows, (heads, kv_heads, head_dim) = max(1, options.tokens // length), SHAPES[shape]
    mask, seen = make_mask(kind, rows, length)
    rng = np.random.default_rng(0)
    sizes = [
        (rows, length, heads, head_dim),
        *[(rows, kv_heads, length, head_dim)] * 2,
        (rows, length, heads, head_dim),
    ]
    arrays = [jnp.asarray(rng.normal(size=size), options.dtype) for size in sizes]
    found: dict[str, Any] = {}
    sides: dict[str, Side] = {}
    for kernel in [*options.kernels, *(f"triton {tiles}" for tiles in options.tiles)]:
        try:
            found[kernel], sides[kernel] = prepare(options, kernel, mask, arrays, kind)
        except Exception as error:
            found[kernel] = {"error": f"{type(error).__name__}: {error}"[:300]}
    if not options.no_peer and kind == "causal":
        found["torch"], side = prepare_torch(options, arrays)
        if side is not None:
            sides["torch"] = side
    compare(found)
    times: dict[str, list[list[float]]] = {name: [[], []] for name in sides}
    for _ in range(options.repeats):
        for name, functions in sides.items():
            for kept, function in zip(times[name], functions):
                kept.append(timed(function, options.calls))
    flops = 4 * heads * head_dim * float(np.broadcast_to(seen, (rows, length)).sum())
    for name, (forward, whole) in times.items():
        found[name] |= {
            "forward_seconds": statistics.median(forward),
            "seconds": statistics.median(whole),
            "fastest_seconds": min(whole),
            "flops_per_second": 3.5 * flops / statistics.median(whole),
        }
    return {"shape": shape, "mask": kind, "rows": rows, "length": length, "flops": flops, "kernels": found}


def prepare(options, kernel, mask, arrays, kind) -> tuple[dict[str, Any], Any]:
    """What is known before the timing, and the two functions to time: forward, and with the gradient."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxrft.models import attention
    from jaxrft.models.attention.choice import Use, refusal

    *inputs, weight = arrays
    length, head_dim = inputs[0].shape[1], inputs[0].shape[3]
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    use = Use(platform, options.dtype, head_dim, length, packed=kind == "packed", window=mask.window)
    attend = kernel_with_tiles(kernel) if " " in kernel else attention.KERNELS[kernel]
    if " " not in kernel and (reason := refusal(kernel, use)):
        raise ValueError(reason)
    if kernel == "dense" and length > options.dense_limit:
        raise ValueError(f"whole scores of {length} tokens are above --dense-limit")
    mask = dataclasses.replace(mask, kernel=kernel.split()[0])
    forward = jax.jit(lambda *a: attend(*a, mask)).lower(*inputs).compile()

    def loss(weight, *a):
        return jnp.sum((attend(*a, mask) * weight).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3))).lower(weight, *inputs).compile()
    results = jax.device_get((forward(*inputs), *gradient(weight, *inputs)))
    known = {"temporary_bytes": gradient.memory_analysis().temp_size_in_bytes, "results": results}
    return known, (
        lambda calls: jax.block_until_ready([forward(*inputs) for _ in range(calls)]),
        lambda calls: jax.block_until_ready([gradient(weight, *inputs) for _ in range(calls)]),
    )


def kernel_with_tiles(name: str) -> Callable[..., Any]:
    """Of ``triton`` and three tiles, as the command line takes them."""
    from jaxrft.models.attention.triton import Tile, Tiles, attend_triton

    tiles = Tiles(*(Tile(*map(int, tile.split("x"))) for tile in name.split()[1].split(":")))
    return functools.partial(attend_triton, tiles=tiles)


def prepare_torch(options, arrays) -> tuple[dict[str, Any], Any]:
    try:
        import torch
    except ImportError:
        return {"error": "torch is not installed"}, None
    import jax

    try:
        device = torch_device(jax.default_backend())
    except RuntimeError as error:
        return {"error": str(error)}, None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    query, key, value, weight = (
        torch.tensor(np.asarray(a, np.float32)).to(device, getattr(torch, options.dtype)) for a in arrays
    )
    query, weight = (a.transpose(1, 2).contiguous() for a in (query, weight))

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward(calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                attend(query, key, value)
        wait()

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def gradient(calls: int) -> None:
        for _ in range(calls):
            leaves = [a.detach().requires_grad_() for a in (query, key, value)]
            attend(*leaves).backward(weight)
        wait()

    try:
        forward(1), gradient(1)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}, None
    return {}, (forward, gradient)


def compare(found: dict[str, Any]) -> None:
    """Puts the largest gap to whole scores, over the largest value, in the place of the results."""
    results = {name: known.pop("results") for name, known in found.items() if "results" in known}
    exact = results.get("dense")
    for name, values in results.items():
        if exact is not None and name != "dense":
            pairs = [(np.float32(a), np.float32(b)) for a, b in zip(values, exact)]
            found[name]["gap"] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def timed(function: Callable[[int], Any], calls: int) -> float:
    """Seconds of a call, of several that are waited for together."""
    settle()
    start = time.perf_counter()
    function(calls)
    return (time.perf_counter() - start) / calls


def lines(case: dict[str, Any]) -> list[list[str]]:
    start = [str(case[name]) for name in ("shape", "mask", "rows", "length")]
    out = []
    for kernel, known in case["kernels"].items():
        if "error" in known:
            out.append([*start, kernel, "not run: " + known["error"].splitlines()[0][:80]])
            continue
        cells = [f"{1e3 * known[name]:.2f}" for name in ("forward_seconds", "seconds")]
        memory = f"{known['temporary_bytes'] / 2**20:.0f}" if "temporary_bytes" in known else "-"
        gap = f"{known['gap']:.1e}" if "gap" in known else "-"
        out.append([*start, kernel, *cells, f"{known['flops_per_second'] / 1e12:.3f}", memory, gap])
    return out


if __name__ == "__main__":
    main()
