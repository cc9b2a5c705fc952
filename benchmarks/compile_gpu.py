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
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
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
    jax.config.update("jax_platforms", "cpu")
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
    options = parser.parse_args(argv)
    if not options.target.is_file():
        parser.error(f"--target: there is no file {options.target}")
    return options


def compile_step(options: argparse.Namespace) -> dict[str, Any]:
    """The compiled program's text, and what it takes of each device."""
    case = Case(
        model=options.shape, length=options.length, dtype="bfloat16", strategy=options.strategy, mesh=options.mesh,
        remat=options.remat, scan_layers=False, packed=options.batching == "packed",
        micro_batches=options.micro_batches, rows=options.rows,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jax, "default_backend", return_value="gpu"))
        # Kernels cannot be tried here: they are taken to work.
        stack.enter_context(mock.patch("jaxrft.models.attention.choice.probe", return_value=None))
        stack.enter_context(mock.patch("jaxrft.models.logit_chunks.choose_way", hopper_way))
        lowered, planned = lower(case, options)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    found = {"arguments_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    return {"text": compiled.as_text(), "seconds": seconds, "memory": found | {"planned_bytes": planned}}


def hopper_way(dtype: Any, hidden: int, words: int, transposed: bool) -> str:
    """How logits are reduced on a GPU whose kernels work."""
    from jaxrft.models.logit_product import refusal

    return "rows" if refusal(dtype, hidden, words, transposed) else "product"


def lower(case: Case, options: argparse.Namespace) -> tuple[Any, float]:
    """The step, lowered for the target, and the bytes that the trainer plans for it."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxrft.models import Decoder, spec_from_config
    from jaxrft.models.stack import Remat
    from jaxrft.parallel import Layout
    from jaxrft.training.batch import batch_shardings
    from jaxrft.training.learner import UNBOUNDED, make_rows
    from jaxrft.training.optimizer import adamw, schedule
    from jaxrft.training.parts import build_recipe
    from jaxrft.training.plan import make_plan
    from jaxrft.training.state import Placement, init_state
    from jaxrft.training.step import make_train_step

    fields = step_shapes.hf_config(case.model, case.length)
    fields |= {"num_hidden_layers": options.layers} if options.layers else {}
    config, spec = config_of(case), spec_from_config(fields)
    layout = Layout(target_mesh(options.target, case.mesh), config.parallel.chosen_strategy)
    model = nnx.eval_shape(lambda: Decoder(spec, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    model.remat = Remat(case.remat)
    graphdef, params = nnx.split(model)
    optimizer, placement = adamw(config), Placement(layout)
    like = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    step = make_train_step(
        graphdef, optimizer, schedule(config, 10**6), build_recipe(config).policy, config.max_grad_norm,
        placement=placement, like=like, num_groups=config.rollout_prompts,
    )  # fmt: skip
    batch = make_rows(config, step_shapes.make_samples(config.rollout_samples, case.length, spec.vocab_size))
    arguments = (abstract(like, placement.shardings(like)), abstract(batch, batch_shardings(batch, layout)))
    plan = make_plan(config, spec, layout, reference=False, limit=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        traced = step.trace(*arguments, UNBOUNDED, np.float32(0))  # type: ignore[attr-defined]
        return traced.lower(lowering_platforms=("cuda",)), sum(plan.update.values())


def target_mesh(target: Path, sizes: dict[str, int]) -> Any:
    """A mesh of GPUs that nothing can run on."""
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    count = math.prod(sizes.values())
    options = {"target_config": target.read_text(encoding="utf-8"), "topology": f"1x1x{count}"}
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
    except NotImplementedError as error:
        raise SystemExit(
            f"error: no compiler for GPUs here ({error}); run: pip install 'jax[cuda13]>=0.11.2'"
        ) from error
    devices = np.array(found.devices).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes with their placement."""
    whole = jax.tree.map(lambda _, sharding: sharding, tree, jax.tree.broadcast(shardings, tree))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, whole)


def read(text: str) -> dict[str, Any]:
    """Loops, collectives and calls of a compiled program."""
    collectives: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        # Of one that is in two parts, the second has the result.
        match = re.match(rf"\s*(?:ROOT )?%\S+ = (.*?) ({COLLECTIVES})(?:-done)?\(", line)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if match else ():
            entry = collectives.setdefault(f"{match[2]} {kind}", {"count": 0, "bytes": 0})  # type: ignore[index]
            entry["count"] += 1
            entry["bytes"] += WIDTHS.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
    turns = Counter(re.findall(r'known_trip_count":\{"n":"(\d+)"', text))
    calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return {"loops": dict(turns), "collectives": collectives, "calls": dict(calls)}


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Lines of the table."""
    memory = found["memory"]
    compiled = memory["arguments_bytes"] + memory["temporary_bytes"]
    yield ["memory, GiB", f"{compiled / 2**30:.2f}, planned {memory['planned_bytes'] / 2**30:.2f}"]
    for name, entry in sorted(found["collectives"].items()):
        yield [name, f"{entry['count']}, {entry['bytes'] / 2**20:.1f} MiB"]
    yield ["turns of loops", ", ".join(sorted(found["loops"], key=int)) or "none"]
    yield from ([name, str(count)] for name, count in sorted(found["calls"].items()))
    yield ["compiled in", f"{found['seconds']:.0f} s"]


if __name__ == "__main__":
    main()
