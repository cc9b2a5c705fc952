"""The jitted programs of RL training: scoring samples, and one optimizer step on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxrft import algorithms as alg
from jaxrft.parallel import Layout, replicated
from jaxrft.parallel.loss_scale import adjust
from jaxrft.training.batch import TrainBatch, list_order
from jaxrft.training.forward import AnyArray, response_logprobs
from jaxrft.training.micro_batches import Stats, accumulate, map_parts
from jaxrft.training.optimizer import clip_by_norm
from jaxrft.training.state import Placement, TrainState, apply_gradients, under

TrainStep = Callable[
    ["TrainState", TrainBatch, Float[AnyArray, "2"], Float[AnyArray, ""] | np.float32], tuple["TrainState", Stats]
]


def make_score(
    graphdef: nnx.GraphDef, layout: Layout
) -> Callable[[Any, TrainBatch], Float[Array, "parts samples response"]]:
    """A program that gives every response token's log-probability under some parameters."""

    @jax.jit
    @under(layout)
    def score(params: Any, batch: TrainBatch) -> Float[Array, "parts samples response"]:
        model = nnx.merge(graphdef, params)
        return map_parts(lambda part: response_logprobs(model, part)[0], batch)

    return score


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: alg.PolicyObjective,
    max_grad_norm: float,
    *,
    placement: Placement,
    like: TrainState,
    num_groups: int = 1,
    seed: int = 0,
    growth_steps: int = 2000,
) -> TrainStep:
    """A program for one optimizer step; it donates the state it is given.

    Its third argument bounds the mean and the largest |ratio - 1|: when either is exceeded, or a gradient is
    not finite, nothing is updated. Infinite after the audit. Its fourth is the weight of the KL in the loss.

    Args:
        placement: where the state lies.
        like: a state of the structure that the program takes; it may be abstract.
        num_groups: groups of a rollout, where the objective compares the samples of one.
        seed: of the objective's random choices and of stochastic rounding; each step draws anew.
        growth_steps: steps without an overflow after which the loss scale is doubled, with float16.
    """

    @under(placement.layout)
    def train_step(
        state: TrainState,
        batch: TrainBatch,
        ratio_bounds: Float[AnyArray, "2"],
        kl_coef: Float[AnyArray, ""] | np.float32,
    ) -> tuple[TrainState, Stats]:
        whole = alg.totals(batch.mask)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        shared = {"whole": whole, "key": key, "num_groups": num_groups}
        if objective.kl_coef > 0:
            shared["kl_coef"] = kl_coef
        selection = _select(graphdef, objective, state.params, batch, key)
        scale = state.scale
        loss = functools.partial(_micro_loss, graphdef, objective, shared, scale)
        gradients, stats = accumulate(loss, state.params, (batch, selection), placement)
        gradients = jax.tree.map(lambda g: g / scale, gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(stats["loss"])
        # Without a token to train on, momentum and weight decay would still move the parameters.
        sound = finite & (whole.tokens > 0)
        deviations = jnp.stack([stats["ratio/deviation_mean"], stats["ratio/deviation_max"]])
        healthy = sound & jnp.all(deviations <= ratio_bounds)
        rate = schedule(state.step)
        params, opt_state = apply_gradients(
            state, optimizer, clip_by_norm(gradients, norm, max_grad_norm), rate, healthy, placement,
            jax.random.fold_in(key, 1),
        )  # fmt: skip
        skipped = state.skipped + (~sound).astype(jnp.int32)
        stats |= {"grad_norm": norm, "learning_rate": rate, "skipped_steps": skipped}
        loss_scale = state.loss_scale
        if loss_scale is not None:
            stats["loss_scale"] = scale
            loss_scale = adjust(loss_scale, finite, growth_steps)
        new = TrainState(
            params=params, opt_state=opt_state, step=state.step + 1, skipped=skipped, loss_scale=loss_scale
        )
        return new, stats

    out = (placement.shardings(like), replicated(placement.layout.mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def _select(graphdef, objective, params, batch: TrainBatch, key) -> alg.Selection | None:
    """The tokens that an objective selects from all micro-batches together, by a forward pass of its own.

    One micro-batch is the whole: its loss selects by itself.
    """
    if not objective.selects or batch.tokens.shape[0] == 1:
        return None
    model = nnx.merge(graphdef, params)

    def forward(part: TrainBatch):
        logprobs, entropy = response_logprobs(model, part)
        return logprobs, _old(part, logprobs), entropy

    logprobs, old, entropies = map_parts(forward, batch)
    # Equal ranks and random choices go by the order of the samples, wherever these are packed.
    order = list_order(batch.sample_ids)
    arrays = (logprobs, old, batch.advantages, batch.mask, entropies)
    rows = [jnp.reshape(a, (-1, a.shape[-1]))[order] for a in arrays]
    selection = alg.token_selection(objective, *rows[:4], entropies=rows[4], key=key)
    return jax.tree.map(lambda a: jnp.zeros_like(a).at[order].set(a).reshape(batch.mask.shape), selection)


def _old(part: TrainBatch, logprobs):
    """Log-probabilities before the first update on these samples; in that update, the present ones."""
    return jnp.where(part.use_old, part.old_logprobs, jax.lax.stop_gradient(logprobs))


def _micro_loss(graphdef, objective, shared, scale, params, part: tuple[TrainBatch, alg.Selection | None]):
    batch, selection = part
    logprobs, entropy = response_logprobs(nnx.merge(graphdef, params), batch)
    old = _old(batch, logprobs)
    loss, stats = alg.policy_loss(
        objective,
        logprobs,
        old,
        batch.advantages,
        batch.mask,
        sampler_logprobs=batch.sampler_logprobs,
        entropies=entropy,
        ref_logprobs=batch.ref_logprobs,
        group_ids=batch.groups,
        selection=selection,
        **shared,
    )
    return loss * scale, stats | {"loss": loss} | _sampler_stats(old, entropy, batch, shared["whole"])


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
