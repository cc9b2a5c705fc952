"""cuDNN's fused attention: by JAX's public function for rows of one segment each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.models.attention.cudnn_packed import attend_cudnn_packed
from jaxrft.models.attention.mask import AttentionMask


def attend_cudnn(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads time head_dim"],
    value: Float[Array, "batch kv_heads time head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention of causal rows, of 16 bits a number.

    What stands behind a row's length is 0, where lengths are known. They are given to cuDNN, or a packed row's
    segments, never a mask: it would be an array of queries by keys.
    """
    if mask.packed:
        return attend_cudnn_packed(query, key, value, mask)
    # A row of no token at all would divide by 0.
    lengths = None if mask.lengths is None else jnp.maximum(mask.lengths, 1).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        # Keys to the left, beside the query's own.
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
