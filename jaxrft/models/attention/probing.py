"""Whether an implementation of attention works on this device: it is tried before it is taken."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.models.attention import KERNELS, attend_cached
from jaxrft.models.attention.mask import cache_mask, causal_mask
from jaxrft.models.once import Once
from jaxrft.models.trial import fault

# Of a kernel's result and gradients from those of whole scores, of the largest of them: some roundings of bfloat16.
PROBE_TOLERANCE = 0.05
# What is compared.
GRADIENTS: tuple[str, ...] = ("values", "gradients of queries", "of keys", "of values")
DECODED = ("values", "values with a new token", "keys of the cache", "values of the cache") * 2


@Once
def probe(kernel: str, dtype: str, head_dim: int, window: int | None = None, packed: bool = False) -> str | None:
    """Runs a kernel on a small case and compares it, gradients too where it has them, with whole scores.

    Args:
        packed: whether the case is of packed rows, else of rows with lengths; of no meaning for caches.

    Returns:
        What is wrong; None: nothing is.
    """
    run, names = _probed, GRADIENTS
    if kernel == "triton_decode":
        run, names = _decoded, DECODED
    tried, plain = (functools.partial(run, name, packed, dtype, head_dim, window) for name in (kernel, "dense"))
    return fault(tried, plain, names, PROBE_TOLERANCE)


def _decoded(kernel: str, packed: bool, dtype: str, head_dim: int, window: int | None) -> list[np.ndarray]:
    """One query a slot, to caches of which some are hardly filled; of lengths at which keys are split and are not."""
    return [array for keys in (256, 512) for array in _decoded_from(keys, kernel, dtype, head_dim, window)]


def _decoded_from(keys: int, kernel: str, dtype: str, head_dim: int, window: int | None) -> list[np.ndarray]:
    slots, heads, kv_heads = 3, 6, 2
    rng = np.random.default_rng(0)
    lengths = (1, 1, keys, keys)
    shapes = [(slots, 1, heads, head_dim), *((slots, kv_heads, length, head_dim) for length in lengths)]
    query, *arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    new, cache = tuple(arrays[:2]), tuple(arrays[2:])
    mask = cache_mask(jnp.array([0, 150, keys - 1]), window, kernel)
    seen = jax.jit(functools.partial(KERNELS[kernel], mask=mask))(query, *cache)
    # In place, as an engine has it.
    extend = jax.jit(functools.partial(attend_cached, window=keys), donate_argnums=2)
    extended, cache = extend(query, new, cache, mask)
    return [np.asarray(a, np.float32) for a in (seen, extended, *cache)]


def _probed(kernel: str, packed: bool, dtype: str, head_dim: int, window: int | None) -> list[np.ndarray]:
    batch, time, heads, kv_heads = 2, 384, 4, 2
    rng = np.random.default_rng(0)
    shapes = [(batch, time, heads, head_dim), *[(batch, kv_heads, time, head_dim)] * 2]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    weight = rng.normal(size=shapes[0]).astype(np.float32)
    # Lengths, behind which anything may stand, or segments, of which one is padding: of any length, and not as many in
    # each row, so that places that are counted wrongly are seen; some so long that whole blocks of keys are seen.
    lengths = np.array([time, 342 if packed else time // 3], np.int32)
    weight[np.arange(time)[None] >= lengths[:, None]] = 0.0
    rows = ((1, 70, 33, 64, 24, 192), (60, 282, 42))
    ids = np.stack([np.repeat(np.arange(len(row), dtype=np.int32), row) for row in rows])
    kind: dict[str, Any] = {"segment_ids": ids} if packed else {"lengths": lengths}
    narrow = None if window is None else min(window, time // 4)

    def value(*arrays):
        out = KERNELS[kernel](*arrays, causal_mask(time, narrow, **kind))
        return jnp.sum(out * weight), out * weight

    gradients, out = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(a, np.float32) for a in (out, *gradients)]
