"""Log-probabilities of responses under a model, aligned to the response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrft import parallel
from jaxrft.models.logprobs import model_logprobs

if TYPE_CHECKING:
    from jaxrft.training.batch import TrainBatch

# Batches are built on the host, and may be handed over as they are.
AnyArray = jax.Array | np.ndarray


def response_logprobs(
    model: Any, part: TrainBatch
) -> tuple[Float[Array, "samples response"], Float[Array, "samples response"]]:
    """Log-probability and entropy of each response token of a micro-batch, at its own temperature.

    Prompts are never projected to the vocabulary where the batch has ``places``. What stands at a time step that
    predicts no response token, NaN too, reaches neither the results nor the gradient of the projection.

    Args:
        model: a module with ``hidden`` and ``output_kernel``.
        part: one micro-batch: a batch without its first axis.

    Returns:
        float32; 0 where ``sources`` are negative.
    """
    segments = {} if part.segment_ids is None else {"segment_ids": part.segment_ids}
    hidden = model.hidden(part.tokens, part.lengths, **segments)
    targets = jnp.roll(part.tokens, -1, axis=1)
    if part.places is not None:
        hidden = parallel.constrain(jnp.take_along_axis(hidden, part.places[..., None], axis=1), ("batch", None, None))
        targets = jnp.take_along_axis(targets, part.places, axis=1)
    # Negative indices would count from the end; those past it are dropped, and filled with 0.
    sources = jnp.where(part.sources < 0, targets.size, part.sources)
    read = jnp.zeros((targets.size,), bool).at[sources].set(True, mode="drop").reshape(targets.shape)
    # A cotangent of 0 alone would still make NaN of a NaN.
    hidden = jnp.where(read[..., None], hidden, 0.0)
    # Rows keep their axis: flattened into one of tokens, every device would project the tokens of all.
    values = model_logprobs(model, hidden, targets, jnp.asarray(part.temperature))
    # From here on there is a number a token: every device has them all.
    logprobs, entropy = (jnp.ravel(parallel.constrain(value, (None, None))) for value in values)
    fill: dict[str, Any] = {"mode": "fill", "fill_value": 0.0}
    return logprobs.at[sources].get(**fill), entropy.at[sources].get(**fill)
