"""Log-probabilities of responses under a model, aligned to the response."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrft.models.logprobs import projected_logprobs

# Batches are built on the host, and may be handed over as they are.
AnyArray = jax.Array | np.ndarray


def response_logprobs(
    model: Any,
    tokens: Int[AnyArray, "rows time"],
    prompt_lengths: Int[AnyArray, "rows"],
    lengths: Int[AnyArray, "rows"],
    temperature: Float[AnyArray, "rows response"],
) -> tuple[Float[Array, "rows response"], Float[Array, "rows response"]]:
    """Log-probability and entropy of each response token; prompts are never projected to the vocabulary.

    Args:
        model: a module with ``hidden`` and ``output_kernel``.
        tokens: prompt and response, right-padded.
        prompt_lengths: tokens of the prompt.
        lengths: tokens of both.
        temperature: each response token's own.

    Returns:
        float32; 0 past the length.
    """
    hidden = model.hidden(tokens, lengths)
    # Column 0 of the response is predicted by the prompt's last token.
    predicting = prompt_lengths[:, None] - 1 + jnp.arange(temperature.shape[1])
    predicting = jnp.minimum(predicting, tokens.shape[1] - 2)
    chosen = jnp.take_along_axis(hidden, predicting[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, predicting + 1, axis=1)
    # Rows keep their axis: flattened into one of tokens, every device would project the tokens of all.
    logprobs, entropy = projected_logprobs(chosen, model.output_kernel, targets, jnp.asarray(temperature))
    valid = jnp.arange(temperature.shape[1]) < (lengths - prompt_lengths)[:, None]
    return jnp.where(valid, logprobs, 0.0), jnp.where(valid, entropy, 0.0)
