"""What the compiled program of an optimizer step takes on each device, by the compiler's own account.

State is abstract and nothing of it is allocated: a model may be larger than the machine.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrft.config import RLConfig
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.stack import Remat
from jaxrft.parallel import Layout
from jaxrft.training import parts
from jaxrft.training.batch import Sample, batch_shardings, select_step
from jaxrft.training.learner import UNBOUNDED, make_rows
from jaxrft.training.optimizer import adamw, schedule
from jaxrft.training.state import Placement, init_state
from jaxrft.training.step import make_train_step


def lower_step(config: RLConfig, spec: DecoderSpec, remat: str, layout: Layout | None = None) -> Any:
    """The lowered train step of a run whose samples are all as long as they may be."""
    layout = layout or parts.build_layout(config)
    model = nnx.eval_shape(lambda: Decoder(spec, dtype=jnp.dtype(config.model.dtype), rngs=nnx.Rngs(0)))
    model.remat, model.scan_layers = Remat(remat, tuple(config.memory.remat_names)), config.memory.scan_layers
    model.attention = config.model.attention
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, config.model.param_dtype), params)
    placement, optimizer = Placement(layout, config.memory.offload_optimizer), adamw(config)
    scale = 65536.0 if config.model.dtype == "float16" else None
    like = jax.eval_shape(lambda params: init_state(params, optimizer, scale), params)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule(config, 10),
        parts.build_recipe(config).policy,
        config.max_grad_norm,
        placement=placement,
        like=like,
        num_groups=config.rollout_prompts,
    )
    return step.lower(_placed(like, placement.shardings(like)), _batch(config, layout), UNBOUNDED, np.float32(0))


def step_bytes(config: RLConfig, spec: DecoderSpec, remat: str, layout: Layout | None = None) -> int:
    """Bytes of each device that the step's arguments, results and temporary values take together."""
    found = lower_step(config, spec, remat, layout).compile().memory_analysis()
    # Donated arguments become results.
    own = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + own


def _placed(tree: Any, shardings: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, jax.tree.leaves(shardings), strict=True)
    return treedef.unflatten([jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in pairs])


def _batch(config: RLConfig, layout: Layout) -> Any:
    prompt, response = config.max_prompt_length, config.max_completion_length
    sample = Sample(prompt_ids=[1] * prompt, response_ids=[1] * response, logprobs=np.zeros(response))
    rows = make_rows(config, [sample] * config.rollout_samples)
    batch = jax.device_put(rows, batch_shardings(rows, layout))
    steps = config.micro_batches // config.gradient_accumulation_steps
    batch = batch if steps == 1 else select_step(batch, 0, steps)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), batch)
