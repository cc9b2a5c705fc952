"""A model of 7.6 billion parameters, compiled for many devices from shapes alone.

``python -m tests.parallel.lowering 8 zero3 ...`` prints a JSON record for each strategy; it wants that many devices.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrft.config import ParallelConfig, RLConfig
from jaxrft.models import Decoder, DecoderSpec
from jaxrft.models.stack import Remat
from jaxrft.parallel import describe
from jaxrft.training.batch import Sample, batch_shardings, make_batch
from jaxrft.training.optimizer import adamw, schedule
from jaxrft.training.parts import build_layout, build_recipe
from jaxrft.training.state import Placement, init_state
from jaxrft.training.step import make_train_step

# Qwen2.5-7B's.
SPEC = DecoderSpec(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    max_positions=32768,
    qkv_bias=True,
)
SIZES: dict[int, dict[str, dict[str, int]]] = {
    8: {
        "ddp": {"replica": 2, "tensor": 4},
        "zero1": {"fsdp": 8},
        "zero2": {"fsdp": 4, "sequence": 2},
        "zero3": {"fsdp": 8},
        "hsdp": {"replica": 2, "fsdp": 4},
    },
    64: {
        "ddp": {"replica": 16, "tensor": 4},
        "zero1": {"fsdp": 32, "tensor": 2},
        "zero2": {"fsdp": 16, "sequence": 2, "tensor": 2},
        "zero3": {"fsdp": 64},
        "hsdp": {"replica": 2, "fsdp": 4, "sequence": 2, "tensor": 4},
    },
}


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes with their placement."""
    whole = jax.tree.map(lambda _, sharding: sharding, tree, jax.tree.broadcast(shardings, tree))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, whole)


def record(devices: int, strategy: str) -> dict[str, Any]:
    """What the compiled step takes on each device."""
    config = RLConfig(parallel=ParallelConfig(strategy=strategy, **SIZES[devices][strategy]))
    layout = build_layout(config)
    model = nnx.eval_shape(lambda: Decoder(SPEC, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    model.remat, model.scan_layers = Remat("full"), True
    graphdef, params = nnx.split(model)
    optimizer, placement = adamw(config), Placement(layout)
    like = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    step = make_train_step(
        graphdef, optimizer, schedule(config, 10), build_recipe(config).policy, 1.0, placement=placement, like=like
    )
    rows = config.parallel.data_devices
    sample = Sample(prompt_ids=[1] * 24, response_ids=[1] * 1000, logprobs=np.zeros(1000))
    batch = make_batch([sample] * rows, rows, temperature=1.0, pick=config.parallel.sequence == 1)
    arguments = (
        abstract(like, placement.shardings(like)),
        abstract(batch, batch_shardings(batch, layout)),
        np.ones(2, np.float32),
        np.float32(0),
    )
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    memory, found = compiled.memory_analysis(), describe(params, layout)
    return {
        "devices": devices,
        "strategy": strategy,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "state": found.param_bytes + found.moment_bytes,
        "gradients": found.gradient_bytes,
        "batch": sum(a.nbytes for a in jax.tree.leaves(batch)),
        "whole": found.whole,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(record(int(sys.argv[1]), name)), flush=True)
