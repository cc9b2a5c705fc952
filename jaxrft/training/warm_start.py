"""A short supervised stage that gives a model made from scratch something for RL to build on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxrft import algorithms as alg
from jaxrft.config import ConfigError, WarmStartConfig
from jaxrft.data.order import PromptOrder
from jaxrft.data.records import Prompt
from jaxrft.training.batch import Sample, TrainBatch, make_batch
from jaxrft.training.forward import response_logprobs
from jaxrft.training.optimizer import clip_by_norm


def supervised_samples(prompts: Sequence[Prompt], column: str, tokenizer: Any) -> list[Sample]:
    """Prompts with their answers as responses, ended by the end-of-sequence token.

    Raises:
        ConfigError: a prompt has no answer.
    """
    samples = []
    for prompt in prompts:
        if column not in prompt.columns:
            raise ConfigError(
                f"warm_start.answer_column: the data has no column {column!r}, "
                f"takes one of {', '.join(sorted(prompt.columns)) or 'none but prompt'}"
            )
        answer = tokenizer.encode(str(prompt.columns[column]), add_special_tokens=False)
        response = [*answer, tokenizer.eos_token_id]
        samples.append(Sample(prompt_ids=prompt.token_ids, response_ids=response, logprobs=0.0, advantage=0.0))
    return samples


def warm_start(
    config: WarmStartConfig,
    graphdef: nnx.GraphDef,
    params: Any,
    samples: Sequence[Sample],
    *,
    seed: int,
    accuracy: Callable[[Any, int], float],
    report: Callable[[int, dict[str, float]], None],
) -> tuple[Any, int]:
    """Trains on ``samples`` until ``accuracy`` reaches the target, or for ``max_steps``.

    Args:
        config: how long and how fast.
        graphdef, params: the model, split; the parameters are donated.
        samples: what to learn.
        seed: of the samples' order.
        accuracy: greedy accuracy on held-out prompts of the parameters it is given, after that many steps.
        report: called with each looked-at step and its metrics.

    Returns:
        The trained parameters, and the number of steps made.
    """
    optimizer = optax.scale_by_adam(b2=0.99)
    step_fn = _make_step(graphdef, optimizer, config)
    opt_state = optimizer.init(params)
    order = PromptOrder(len(samples), min(config.batch_size, len(samples)), seed=seed, shuffle=True)
    longest = max(samples, key=lambda s: len(s.prompt_ids) + len(s.response_ids))
    for step in range(1, config.max_steps + 1):
        # The longest sample rides along and is dropped, so that all batches have one shape.
        chosen = [samples[i] for i in order.indices(step - 1)]
        batch = make_batch([*chosen, longest], len(chosen) + 1, temperature=1.0)
        batch = jax.tree.map(lambda a: a[:, :-1] if a.ndim > 1 else a, batch)
        params, opt_state, loss = step_fn(params, opt_state, batch, step)
        if step % config.eval_steps == 0 or step == config.max_steps:
            reached = accuracy(params, step)
            report(step, {"loss": float(loss), "eval/accuracy": reached})
            if reached >= config.target_accuracy:
                return params, step
    return params, config.max_steps


def _make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: WarmStartConfig):
    warmup = max(config.max_steps // 10, 1)

    def loss_fn(params: Any, batch: TrainBatch) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        part = jax.tree.map(lambda a: a[0], batch)
        logprobs, _ = response_logprobs(model, part.tokens, part.prompt_lengths, part.lengths, part.temperature)
        return -jnp.sum(logprobs * alg.token_weights(part.mask, "token_mean", alg.totals(part.mask)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params: Any, opt_state: Any, batch: TrainBatch, step: int):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        gradients = clip_by_norm(gradients, optax.global_norm(gradients), 1.0)
        directions, opt_state = optimizer.update(gradients, opt_state, params)
        rate = config.learning_rate * jnp.minimum(step / warmup, 1.0)
        params = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, directions)
        return params, opt_state, loss

    return step_fn
