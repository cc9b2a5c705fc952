"""What an optimizer step changes, and where it lies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrft.parallel import Layout, replicated
from jaxrft.parallel.host import host_shardings
from jaxrft.parallel.loss_scale import LossScale, initial_loss_scale
from jaxrft.parallel.rounding import cast_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that an optimizer step changes.

    Attributes:
        params: the model's parameters, as ``nnx.split`` gives them.
        opt_state: the optimizer's; its moments are float32.
        step: optimizer steps made, skipped ones included.
        skipped: steps that changed nothing, because a gradient was not finite or no token was to be trained.
        loss_scale: with float16 alone.
    """

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    loss_scale: LossScale | None = None

    @property
    def scale(self) -> Float[Array, ""]:
        """What the loss is multiplied with: 1 but for float16."""
        return jnp.float32(1) if self.loss_scale is None else self.loss_scale.value


def init_state(params: Any, optimizer: optax.GradientTransformation, loss_scale: float | None = None) -> TrainState:
    """State before the first step.

    Args:
        loss_scale: the first one, with float16.
    """
    zero = jnp.zeros((), jnp.int32)
    moments = optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))
    scale = None if loss_scale is None else initial_loss_scale(loss_scale)
    return TrainState(params=params, opt_state=moments, step=zero, skipped=zero + 0, loss_scale=scale)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a train state lies, between steps and within one.

    Attributes:
        layout: mesh and strategy.
        offload_optimizer: optimizer moments lie in the host's memory between steps.
    """

    layout: Layout
    offload_optimizer: bool = False

    def shardings(self, state: TrainState) -> TrainState:
        """Of a state, which may be abstract, between steps."""
        whole = replicated(self.layout.mesh)
        moments = self.layout.shardings("moments", state.opt_state)
        return TrainState(
            params=self.layout.shardings("params", state.params),
            opt_state=host_shardings(moments) if self.offload_optimizer else moments,
            step=whole,
            skipped=whole,
            loss_scale=jax.tree.map(lambda _: whole, state.loss_scale),
        )

    def lay(self, kind: str, tree: Any) -> Any:
        """Inside a program: a tree of parameters, gradients or moments where the strategy has them on the devices."""
        return jax.lax.with_sharding_constraint(tree, self.layout.shardings(kind, tree))


def make_init(
    params: Any, optimizer: optax.GradientTransformation, placement: Placement, loss_scale: float | None = None
) -> tuple[Callable[[Any], TrainState], TrainState]:
    """A function that makes the state before the first step where it belongs, and what it makes, abstract.

    Moments are made in their shards: whole ones of a large model would not fit on one device. Parameters are moved, not
    copied, where they lie elsewhere.

    Args:
        params: of the structure that the function will be given; they may be abstract.
        loss_scale: the first one, with float16.
    """

    def rest(params: Any) -> TrainState:
        return dataclasses.replace(init_state(params, optimizer, loss_scale), params=None)

    like = jax.eval_shape(lambda params: init_state(params, optimizer, loss_scale), params)
    shardings = placement.shardings(like)
    make = jax.jit(rest, out_shardings=dataclasses.replace(shardings, params=None))

    def init(params: Any) -> TrainState:
        placed = jax.device_put(params, shardings.params)
        return dataclasses.replace(make(placed), params=placed)

    return init, like


def delete(tree: Any) -> None:
    """Frees the arrays of a tree, whoever else holds them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def is_deleted(tree: Any) -> bool:
    """Whether any of a tree's arrays was freed, as a step does that takes them."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def under(layout: Layout) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of functions that are traced for a layout."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            with layout.use():
                return function(*arguments)

        return run

    return wrap


def apply_gradients(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradients: Any,
    rate: Any,
    healthy: Any,
    placement: Placement,
    key: jax.Array,
) -> tuple[Any, Any]:
    """Inside a program: parameters and moments after a step; the old ones where it is not ``healthy``.

    The update is computed where the moments lie: in zero1 and zero2 each device changes its share of the parameters,
    and whole ones are gathered from these.

    Args:
        gradients: float32, of the structure of the parameters.
        rate: learning rate.
        key: of stochastic rounding, for parameters in bfloat16.
    """
    before = placement.lay("moments", state.params)
    moments = state.opt_state
    if placement.offload_optimizer:
        # A sharding alone would name the same memory again: only the space moves an array inside a program.
        moments = jax.device_put(moments, jax.memory.Space.Device)
    directions, opt_state = optimizer.update(placement.lay("moments", gradients), moments, before)
    moved = jax.tree.map(lambda p, d: p.astype(jnp.float32) - rate * d, before, directions)
    params = cast_like(key, moved, before)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(healthy, new, old), (params, opt_state), (before, moments)
    )
    if placement.offload_optimizer:
        opt_state = jax.device_put(opt_state, jax.memory.Space.Host)
    return placement.lay("params", params), opt_state
