"""The jitted programs of RL training: scoring samples, and one optimizer step on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrft import algorithms as alg
from jaxrft.training.batch import TrainBatch, list_order
from jaxrft.training.forward import AnyArray, response_logprobs
from jaxrft.training.optimizer import clip_by_norm

Stats = dict[str, Float[Array, ""]]
TrainStep = Callable[
    ["TrainState", TrainBatch, Float[AnyArray, "2"], Float[AnyArray, ""] | np.float32], tuple["TrainState", Stats]
]


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


def make_score(graphdef: nnx.GraphDef) -> Callable[[Any, TrainBatch], Float[Array, "parts samples response"]]:
    """A program that gives every response token's log-probability under some parameters."""

    @jax.jit
    def score(params: Any, batch: TrainBatch) -> Float[Array, "parts samples response"]:
        model = nnx.merge(graphdef, params)
        return _map_parts(lambda part: response_logprobs(model, part)[0], batch)

    return score


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: alg.PolicyObjective,
    max_grad_norm: float,
    *,
    num_groups: int = 1,
    seed: int = 0,
) -> TrainStep:
    """A program for one optimizer step; it donates the state it is given.

    Its third argument bounds the mean and the largest |ratio - 1|: when either is exceeded, or a gradient is
    not finite, nothing is updated. Infinite after the audit. Its fourth is the weight of the KL in the loss.

    Args:
        num_groups: groups of a rollout, where the objective compares the samples of one.
        seed: of the objective's random choices; each step draws anew.
    """

    @functools.partial(jax.jit, donate_argnums=0)
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
        loss = functools.partial(_micro_loss, graphdef, objective, shared)
        gradients, stats = _accumulate(loss, state.params, (batch, selection))
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


def _accumulate(loss, params, batch):
    """Gradients and statistics of all micro-batches: sums, since each part is weighted by the whole's counts."""

    def one(part):
        (_, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, part)
        return gradients, stats

    used, parts = batch[0].used, (dataclasses.replace(batch[0], used=None), batch[1])
    if parts[0].tokens.shape[0] == 1:
        return one(_part(parts, 0))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def add(total, part):
        gradients, stats = one(part)
        return jax.tree.map(jnp.add, total, gradients), stats

    if used is None:
        gradients, stats = jax.lax.scan(add, zeros, parts)
        return gradients, alg.merge_stats(stats)

    def add_used(number, totals):
        gradients, stats = add(totals[0], _part(parts, number))
        return gradients, alg.merge_stats({k: jnp.stack([totals[1][k], v]) for k, v in stats.items()})

    shapes = jax.eval_shape(one, _part(parts, 0))[1]
    nothing = {"max": -jnp.inf, "min": jnp.inf}
    stats = {name: jnp.full(s.shape, nothing.get(name[-3:], 0.0), s.dtype) for name, s in shapes.items()}
    return _over_used(used, parts[0].tokens.shape[0], add_used, (zeros, stats))


def _part(parts, number):
    return jax.tree.map(lambda a: a[number], parts)


def _over_used(used, parts: int, body, start):
    """``body(number, carry)`` for the number of each micro-batch that holds anything, and for no other."""
    each = parts // used.shape[0]

    def one_step(step, carry):
        return jax.lax.fori_loop(step * each, step * each + used[step], body, carry)

    return jax.lax.fori_loop(0, used.shape[0], one_step, start)


def _map_parts(function, batch: TrainBatch):
    """``function`` of each micro-batch, stacked; zeros for those that hold nothing."""
    used, parts = batch.used, dataclasses.replace(batch, used=None)
    if used is None:
        return jax.lax.map(function, parts)
    count = parts.tokens.shape[0]

    def write(number, arrays):
        return jax.tree.map(lambda a, value: a.at[number].set(value), arrays, function(_part(parts, number)))

    shapes = jax.eval_shape(function, _part(parts, 0))
    zeros = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)
    return _over_used(used, count, write, zeros)


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

    logprobs, old, entropies = _map_parts(forward, batch)
    # Equal ranks and random choices go by the order of the samples, wherever these are packed.
    order = list_order(batch.sample_ids)
    arrays = (logprobs, old, batch.advantages, batch.mask, entropies)
    rows = [jnp.reshape(a, (-1, a.shape[-1]))[order] for a in arrays]
    selection = alg.token_selection(objective, *rows[:4], entropies=rows[4], key=key)
    return jax.tree.map(lambda a: jnp.zeros_like(a).at[order].set(a).reshape(batch.mask.shape), selection)


def _old(part: TrainBatch, logprobs):
    """Log-probabilities before the first update on these samples; in that update, the present ones."""
    return jnp.where(part.use_old, part.old_logprobs, jax.lax.stop_gradient(logprobs))


def _micro_loss(graphdef, objective, shared, params, part: tuple[TrainBatch, alg.Selection | None]):
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
    return loss, stats | {"loss": loss} | _sampler_stats(old, entropy, batch, shared["whole"])


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
