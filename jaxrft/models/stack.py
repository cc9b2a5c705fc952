"""The layers of a model one after another: unrolled or scanned, with what their backward pass keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxrft import parallel
from jaxrft.models.attention import AttentionMask
from jaxrft.models.rope import RopeTables

# Tensors of a layer that carry a name, in the order in which they are computed.
TENSOR_NAMES = ("layer_input", "query", "key", "value", "attention", "gate", "up")


@dataclasses.dataclass(frozen=True)
class Remat:
    """What is kept of a layer from the forward to the backward pass (rematerialisation, arXiv:1604.06174).

    Attributes:
        policy: ``none`` keeps all that the gradient needs; ``full`` keeps each layer's input and computes the rest
            again; ``save`` keeps the tensors in ``names`` as well; ``offload`` moves these to the host's memory.
        names: of :data:`TENSOR_NAMES`. Under ``offload`` without ``layer_input``, that one stays on the device.

    Raises:
        ValueError: an unknown policy or name.
    """

    policy: str = "none"
    names: tuple[str, ...] = ("query", "key", "value", "attention")

    def __post_init__(self) -> None:
        if self.policy not in ("none", "full", "save", "offload"):
            raise ValueError(f"remat: got {self.policy!r}, takes none, full, save or offload")
        unknown = [name for name in self.names if name not in TENSOR_NAMES]
        if unknown:
            raise ValueError(f"remat_names: got {unknown[0]!r}, takes {', '.join(TENSOR_NAMES)}")

    def wrap(self, layer: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
        """``layer`` under this policy."""
        policies = jax.checkpoint_policies
        match self.policy:
            case "none":
                return layer
            case "full":
                policy = policies.nothing_saveable
            case "save":
                policy = policies.save_only_these_names(*self.names)
            case _:
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(self.names),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
        # In a loop, nothing outside can be taken for what is computed again.
        return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def run_layers(
    layers: Sequence[nnx.Module],
    x: Float[Array, "batch time hidden"],
    rope: RopeTables,
    masks: Sequence[AttentionMask],
    chosen: Sequence[int],
    *,
    remat: Remat,
    scan: bool,
) -> Float[Array, "batch time hidden"]:
    """What goes through all layers comes out.

    Args:
        layers: modules ``(x, rope, mask) -> (x, cache)`` of one structure.
        masks: those that occur.
        chosen: which of them each layer takes.
        scan: run one layer's program in a loop, over parameters that are stacked for it: compiled in a fraction
            of the time, at the price of one copy of the (sharded) parameters and of their gradients.
    """
    graphdef = nnx.graphdef(layers[0])
    states = [nnx.state(layer) for layer in layers]

    def one(x: Any, state: Any, rope: RopeTables, mask: Any) -> Any:
        return nnx.merge(graphdef, state)(checkpoint_name(x, "layer_input"), rope, mask)[0]

    run = remat.wrap(one, scanned=scan)
    if not scan:
        for state, mask in zip(states, chosen):
            x = run(x, state, rope, masks[mask])
        return x
    every = jax.tree.map(lambda *arrays: jnp.stack(arrays), *masks) if len(masks) > 1 else None

    def body(x: Any, layer: tuple[Any, Any]) -> tuple[Any, None]:
        state, mask = layer
        return run(x, state, rope, masks[0] if every is None else jax.tree.map(lambda a: a[mask], every)), None

    return jax.lax.scan(body, x, (_stacked(states), jnp.asarray(chosen)))[0]


def _stacked(states: Sequence[Any]) -> Any:
    """States of equal modules as one, each parameter with a leading axis of layers, placed as the single ones are."""
    layout = parallel.current()

    def stack(*parameters: nnx.Variable) -> nnx.Variable:
        value = jnp.stack([parameter.get_value() for parameter in parameters])
        if layout is not None:
            axes, units = parallel.logical_axes(parameters[0])
            spec = layout.parameter("params", axes, value.shape[1:], units)
            value = jax.lax.with_sharding_constraint(value, layout.named(jax.sharding.PartitionSpec(None, *spec)))
        return parameters[0].replace(value)

    return jax.tree.map(stack, *states, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
