"""cuDNN's fused attention for packed rows, on GPUs from Hopper on.

JAX gives segments to cuDNN in an interface that is not public (jax-ml/jax#25812), so that it may change: whether it is
as it is used here is asked before, and whether its results are right is tried on the device (``probing.probe``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrft.models.attention.chunked import attend_chunked
from jaxrft.models.attention.mask import AttentionMask, segments

# What is given to the interface beside queries, keys and values.
OPTIONS = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type", "sliding_window_length")
# Tokens that the segments of a row have on average, at least.
SEGMENT_TOKENS = 64
# Up to JAX 0.11.0 the places of keys are counted with the heads of the queries, which is wrong where keys have fewer.
GROUPED_FROM = (0, 11, 2)


def most_segments(time: int, head_dim: int) -> int:
    """Segments of a row that cuDNN's program is made for.

    For each of them it keeps a float32 a token and head, used or not, and starts blocks of queries that find nothing to
    do: half as many as a head has channels take the memory of attention's result, of 16 bits a number. Not fewer than
    8: of one, JAX makes a program for rows that are not packed.
    """
    return max(8, min(time // SEGMENT_TOKENS, head_dim // 2))


def missing_interface() -> str | None:
    """Why packed rows cannot be given to cuDNN by this JAX, None where they can."""
    try:
        parameters = inspect.signature(_interface().dot_product_attention).parameters
        _interface().MaskType.PADDING_CAUSAL  # noqa: B018
    except (ImportError, AttributeError) as error:
        return f"does not take packed rows with JAX {jax.__version__}, which lacks an interface ({error})"
    if lacking := [name for name in OPTIONS if name not in parameters]:
        return f"does not take packed rows with JAX {jax.__version__}, whose interface lacks {', '.join(lacking)}"
    return None


def attend_cudnn_packed(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads time head_dim"],
    value: Float[Array, "batch kv_heads time head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch time heads head_dim"]:
    """Grouped-query attention of causal packed rows, of 16 bits a number.

    Rows of more segments than :func:`most_segments` go another way, which is decided on the device: Triton's kernel,
    or where that takes no such heads, blocks of scores.

    Raises:
        ValueError: there are more numbers in the queries than cuDNN counts.
    """
    # The interface multiplies places in int32; what fills up its lists stands behind the last token.
    if query.size > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"attention: cudnn takes packed rows of up to 2**31 - 1 numbers together, got {query.size}")
    starts, lengths, fits = segments(mask, most_segments(query.shape[1], query.shape[3]))
    starts, lengths = (jnp.broadcast_to(a, (query.shape[0], a.shape[1])) for a in (starts, lengths))
    fused = _fused(mask.window)
    other = _other(query.shape[3])
    # Kept for the backward pass are its arguments alone, as few rows ever take it.
    kept = jax.checkpoint(lambda q, k, v, *_: other(q, k, v, mask))
    return jax.lax.cond(fits, fused, kept, query, key, value, starts, lengths)


def _other(head_dim: int) -> Callable[..., Array]:
    """What attends where cuDNN's program does not suffice.

    It is compiled into every layer, used or not: of blocks of scores a compiler tries some twenty products on a GPU.
    """
    from jaxrft.models.attention.choice import TRITON_HEAD_DIMS

    if jax.default_backend() == "cpu" or head_dim not in TRITON_HEAD_DIMS:
        return attend_chunked
    from jaxrft.models.attention.triton import attend_triton

    return attend_triton


def _fused(window: int | None) -> Callable[..., Array]:
    interface = _interface()

    def attend(query: Array, key: Array, value: Array, starts: Array, lengths: Array) -> Array:
        group = query.shape[2] // key.shape[1]
        if group > 1 and jax.__version_info__ < GROUPED_FROM:
            key, value = (jnp.repeat(a, group, axis=1) for a in (key, value))
        # One place more than there are segments: where all are used, nothing stands behind the last one of a row.
        places = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
        return interface.dot_product_attention(
            query,
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=places,
            kv_offsets=places,
            scale=query.shape[3] ** -0.5,
            mask_type=interface.MaskType.PADDING_CAUSAL,
            # The query's own key and those to the left of it.
            sliding_window_length=window,
        )

    return attend


def _interface() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
