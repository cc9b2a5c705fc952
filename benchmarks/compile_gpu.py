"""What the compiler for a GPU makes of a train step, on a machine without one.

    python benchmarks/compile_gpu.py --target h100_sxm.txtpb --shape 1.5B --length 8192
    python benchmarks/compile_gpu.py --target h100_sxm.txtpb --shape 7B --mesh fsdp=8 --remat full --hlo step.hlo

Needs jax[cuda13] of 0.11.2 or newer, and no driver. The target is a text of XLA's GpuTargetConfigProto; XLA's sources
have those of usual GPUs (xla/backends/gpu/target_config/specs). The step is compiled from shapes alone, for as many
GPUs as the mesh has, and nothing runs: what cuDNN and cuBLAS will do is not known, nor which of several products the
compiler would take after it has tried them.

memory        of a device: arguments and temporaries, and what the trainer's memory plan counts
loops         turns of each loop whose number is known: one with as many as a row has tokens is a fault
collectives   by kind and type of numbers: how many, and the bytes of their results
calls         of libraries and of Triton's kernels
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import step_shapes
from columns import aligned
from machine import describe_machine, make_report
from step_config import Case, config_of
from train_step import mesh

PACKAGES = ("jaxrft", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles what the command line asks for and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_arguments(argv)
    # The plugin makes no client then, which would want a driver.
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = compile_step(options)
    text = found.pop("text")
    if options.hlo:
        options.hlo.write_text(text, encoding="utf-8")
    found |= read(text)
    report = make_report("compile_gpu.py", argv, describe_machine(PACKAGES), options, **found)
    print(aligned(("what", "found"), rows(found)))
    return report


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="file with the GPU's description")
    parser.add_argument("--shape", choices=step_shapes.SHAPES, default="1.5B")
    parser.add_argument("--layers", type=int, help="of the model, in place of the shape's")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="of a device in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batching", choices=("packed", "padded"), default="packed")
    parser.add_argument("--mesh", type=mesh, default=mesh("1"), help="1, or such as fsdp=2,tensor=2")
    parser.add_argument("--strategy", help="default: what shards most on the mesh")
    parser.add_argument("--remat", choices=("none", "full", "save"), default="none")
    parser.add_argument("--hlo", type=Path, help="file for the compiled program")
    parser.add_argument("--output", type=Path, help="file for the JSON report")
    return parser.parse_args(argv)


def compile_step(options: argparse.Namespace) -> dict[str, Any]:
    """The compiled program's text, its memory, and the plan's."""
    import jax
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies

    from jaxrft.models import Decoder, spec_from_config
    from jaxrft.parallel import Layout, resolve_strategy
    from jaxrft.training.batch import batch_shardings
    from jaxrft.training.learner import UNBOUNDED, make_rows
    from jaxrft.training.optimizer import adamw, schedule
    from jaxrft.training.parts import build_recipe
    from jaxrft.training.state import Placement, init_state
    from jaxrft.training.step import make_train_step

    case = Case(
        model=options.shape, length=options.length, dtype="bfloat16", strategy=options.strategy, mesh=options.mesh,
        remat=options.remat, scan_layers=False, packed=options.batching == "packed",
        micro_batches=options.micro_batches, rows=options.rows,
    )  # fmt: skip
    fields = step_shapes.hf_config(options.shape, options.length)
    fields |= {"num_hidden_layers": options.layers} if options.layers else {}
    return locals()
