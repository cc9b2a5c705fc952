"""The jitted programs of RL training: scoring samples, and one optimizer step on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrft import algorithms as alg
from jaxrft.training.batch import TrainBatch
from jaxrft.training.forward import AnyArray, response_logprobs
from jaxrft.training.optimizer import clip_by_norm

Stats = dict[str, Float[Array, ""]]
TrainStep = Callable[["TrainState", TrainBatch, Float[AnyArray, "2"]], tuple["TrainState", Stats]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that an optimizer step changes.

    Attributes:
        params: the model's parameters, as ``nnx.split`` gives them.
        opt_state: the optimizer's.
        step: optimizer steps made, skipped ones included.
        skipped: steps that changed nothing, because a gradient was not finite or no token was to be trained.
    """

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params=params, opt_state=optimizer.init(params), step=zero, skipped=zero + 0)


def make_score(graphdef: nnx.GraphDef) -> Callable[[Any, TrainBatch], Float[Array, "parts rows response"]]:
    """A program that gives every response token's log-probability under some parameters."""

    @jax.jit
    def score(params: Any, batch: TrainBatch) -> Float[Array, "parts rows response"]:
        model = nnx.merge(graphdef, params)

        def one(part):
            return response_logprobs(model, *part)[0]

        return jax.lax.map(one, (batch.tokens, batch.prompt_lengths, batch.lengths, batch.temperature))

    return score


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: alg.PolicyObjective,
    max_grad_norm: float,
) -> TrainStep:
    """A program for one optimizer step; it donates the state it is given.

    Its third argument bounds the mean and the largest |ratio - 1|: when either is exceeded, or a gradient is
    not finite, nothing is updated. Infinite after the audit.
    """
    loss = functools.partial(_micro_loss, graphdef, objective)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState, batch: TrainBatch, ratio_bounds: Float[AnyArray, "2"]
    ) -> tuple[TrainState, Stats]:
        whole = alg.totals(batch.mask)
        gradients, stats = _accumulate(loss, state.params, batch, whole)
        norm = optax.global_norm(gradients)
        # Without a token to train on, momentum and weight decay would still move the parameters.
        sound = jnp.isfinite(norm) & jnp.isfinite(stats["loss"]) & (whole.tokens > 0)
        deviations = jnp.stack([stats["ratio/deviation_mean"], stats["ratio/deviation_max"]])
        healthy = sound & jnp.all(deviations <= ratio_bounds)
        rate = schedule(state.step)
        directions, opt_state = optimizer.update(
            clip_by_norm(gradients, norm, max_grad_norm), state.opt_state, state.params
        )
        params = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), state.params, directions)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + (~sound).astype(jnp.int32)
        stats |= {"grad_norm": norm, "learning_rate": rate, "skipped_steps": skipped}
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1, skipped=skipped), stats

    return train_step


def _accumulate(loss, params, batch, whole):
    """Gradients and statistics of all micro-batches: sums, since each part is weighted by the whole's counts."""

    def one(part):
        (_, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, part, whole)
        return gradients, stats

    if batch.tokens.shape[0] == 1:
        gradients, stats = one(jax.tree.map(lambda a: a[0], batch))
        return gradients, stats

    def add(total, part):
        gradients, stats = one(part)
        return jax.tree.map(jnp.add, total, gradients), stats

    gradients, stats = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
    return gradients, alg.merge_stats(stats)


def _micro_loss(graphdef, objective, params, part: TrainBatch, whole: alg.Totals):
    model = nnx.merge(graphdef, params)
    logprobs, entropy = response_logprobs(model, part.tokens, part.prompt_lengths, part.lengths, part.temperature)
    old = jnp.where(part.use_old, part.old_logprobs, jax.lax.stop_gradient(logprobs))
    loss, stats = alg.policy_loss(
        objective, logprobs, old, part.advantages, part.mask, ref_logprobs=part.ref_logprobs, whole=whole
    )
    return loss, stats | {"loss": loss} | _sampler_stats(old, entropy, part, whole)


def _sampler_stats(old, entropy, part: TrainBatch, whole: alg.Totals) -> Stats:
    """Entropy, and how far the engine's log-probabilities are from the trainer's."""
    share = part.mask / jnp.maximum(whole.tokens, 1.0)
    trainer, sampler = (jnp.where(part.mask > 0, a, 0.0) for a in (jax.lax.stop_gradient(old), part.sampler_logprobs))
    gap = jnp.abs(trainer - sampler)
    return {
        "entropy": jnp.sum(jax.lax.stop_gradient(entropy) * share),
        "sampling/logprob_difference/mean": jnp.sum(gap * share),
        "sampling/logprob_difference/max": jnp.max(gap, initial=0.0),
        "sampling/kl": jnp.sum(alg.kl(sampler, trainer) * share),
    }
