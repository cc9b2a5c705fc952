"""How the losses of tokens become one number.

A reduction is a weight for every token; the loss is the weighted sum. The weights need
the counts of the *whole* batch, so a batch that is split into micro-batches, padded or spread over
devices gives the same loss and gradient as one that is not: parts are summed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.algorithms.axes import AxisName, axis_sum
from jaxrft.algorithms.choices import require_choice

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class Totals(NamedTuple):
    """Counts of a whole batch: valid tokens, and sequences with at least one of them."""

    tokens: Float[Array, ""]
    sequences: Float[Array, ""]


def totals(mask: Float[Array, "*batch time"], axis_name: AxisName | None = None) -> Totals:
    """Counts of the batch whose ``mask`` (1 for valid tokens) this is, over all devices of a mapped axis."""
    mask = mask.astype(jnp.float32)
    counts = jnp.sum(mask), jnp.sum(jnp.max(mask, axis=-1, initial=0.0))
    return Totals(*(axis_sum(count, axis_name) for count in counts))


def token_weights(
    mask: Float[Array, "batch time"], reduction: Reduction, whole: Totals, constant_length: int | None = None
) -> Float[Array, "batch time"]:
    """Weight of each token's loss; 0 for masked ones.

    Args:
        mask: 1 for valid tokens, 0 elsewhere; holes are allowed.
        reduction: ``token_mean`` (DAPO): 1 / tokens; ``sequence_mean`` (GRPO): mean over sequences of
            token means; ``sequence_sum``: mean over sequences of token sums; ``constant`` (Dr.GRPO): the same
            divided by ``constant_length``. Sequences with no valid token count nowhere.
        whole: counts of the batch that these rows are a part of.
        constant_length: divisor of ``constant``, normally the longest completion allowed.

    Raises:
        ValueError: unknown reduction, or ``constant`` without a length.
    """
    require_choice("reduction", reduction, get_args(Reduction))
    mask = mask.astype(jnp.float32)
    if reduction == "token_mean":
        return mask / jnp.maximum(whole.tokens, 1.0)
    sequence_sum = mask / jnp.maximum(whole.sequences, 1.0)
    if reduction == "sequence_sum":
        return sequence_sum
    if reduction == "sequence_mean":
        return sequence_sum / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    if constant_length is None:
        raise ValueError("constant_length: the reduction 'constant' needs one, normally the longest completion")
    return sequence_sum / constant_length
