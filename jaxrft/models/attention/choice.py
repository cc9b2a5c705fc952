"""Which implementation attends: by device, type, head size, mask and length; and whether it does so rightly here."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.models.attention import KERNELS
from jaxrft.models.attention.mask import causal_mask

logger = logging.getLogger(__name__)

# What a user may ask for.
CHOICES = ("auto", "dense", "chunked", "cudnn", "triton")
# Keys up to which a whole array of scores is faster than blocks of it.
DENSE_KEYS = {"cpu": 512}
ACCELERATOR_DENSE_KEYS = 1024
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
# Of a kernel's result and gradients from those of whole scores, of the largest of them: some roundings of bfloat16.
PROBE_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Use:
    """What attention is wanted for.

    Attributes:
        platform: ``cpu`` or ``gpu``.
        dtype: of queries, keys and values.
        head_dim: channels of a head.
        keys: of a row.
        packed: whether a row holds several segments.
        shares_time: whether several devices share the time steps of a row.
        mixed: whether one program serves layers with different sliding windows.
        window: the layer's sliding window.
        here: whether it is this process's device that attends; else its kernels cannot be tried.
    """

    platform: str
    dtype: str
    head_dim: int
    keys: int
    packed: bool = False
    shares_time: bool = False
    mixed: bool = False
    window: int | None = None
    here: bool = True


@functools.lru_cache(maxsize=256)
def choose(wanted: str, use: Use) -> str:
    """The implementation for whole rows, one of ``KERNELS``. Logged once for each use.

    Args:
        wanted: one of ``CHOICES``; ``auto`` takes the first that can: cuDNN, Triton, then whole scores for short
            rows and blocks of scores for long ones.
        use: what for.

    Raises:
        ValueError: what is wanted cannot do it; the message says why.
    """
    if wanted not in CHOICES:
        raise ValueError(f"attention: got {wanted!r}, takes {', '.join(CHOICES)}")
    if wanted != "auto":
        if reason := refusal(wanted, use):
            raise ValueError(f"attention: got {wanted!r}, which {reason}; takes auto, dense or chunked")
        return wanted
    plain = "dense" if use.keys <= DENSE_KEYS.get(use.platform, ACCELERATOR_DENSE_KEYS) else "chunked"
    refused = []
    for kernel in ("cudnn", "triton") if use.platform != "cpu" else ():
        reason = refusal(kernel, use)
        if reason is None:
            logger.info("attention: %s for %s", kernel, use)
            return kernel
        refused.append(f"{kernel} {reason}")
    logger.info("attention: %s for %s%s", plain, use, "".join(f"; {reason}" for reason in refused))
    return plain


def choose_decode(wanted: str, use: Use) -> str:
    """The implementation for a slot's newest token: Triton's where it is asked for and can, else whole scores."""
    if wanted == "triton" and use.keys % 16 == 0 and refusal("triton", use) is None:
        return "triton_decode"
    return "dense"


def refusal(kernel: str, use: Use) -> str | None:
    """Why a kernel cannot do it, None where it can."""
    if kernel in ("dense", "chunked"):
        return None
    if use.platform == "cpu":
        return "needs an NVIDIA GPU"
    if use.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {use.dtype}"
    if kernel == "triton":
        if use.head_dim not in TRITON_HEAD_DIMS:
            return f"takes heads of {', '.join(map(str, TRITON_HEAD_DIMS))} channels, not {use.head_dim}"
        return _probe(kernel, use)
    if use.packed:
        return "does not take packed rows"
    if use.shares_time:
        return "does not take rows that several devices share"
    if use.mixed:
        return "does not take layers with different windows in one loop"
    return _probe(kernel, use)


def _probe(kernel: str, use: Use) -> str | None:
    return probe(kernel, use.dtype, use.head_dim, use.window) if use.here else None


@functools.lru_cache(maxsize=32)
def probe(kernel: str, dtype: str, head_dim: int, window: int | None = None) -> str | None:
    """Runs a kernel on a small case and compares it, gradients too, with whole scores.

    Whether a kernel works depends on the GPU and on the versions of compilers and libraries, which no table keeps
    up with; and a kernel that is wrong would train a model wrongly.

    Returns:
        What is wrong; None: nothing is.
    """
    with jax.ensure_compile_time_eval():
        try:
            got, expected = (_probed(name, kernel == "triton", dtype, head_dim, window) for name in (kernel, "dense"))
        except Exception as error:
            return f"fails here ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    for name, a, b in zip(("values", "gradients of queries", "of keys", "of values"), got, expected):
        gap = float(np.abs(a - b).max() / np.abs(b).max())
        if not gap <= PROBE_TOLERANCE:
            return f"gives wrong {name} here (off by {gap:.2g} of the largest)"
    return None


def _probed(kernel: str, packed: bool, dtype: str, head_dim: int, window: int | None) -> list[np.ndarray]:
    batch, time, heads, kv_heads = 2, 192, 4, 2
    rng = np.random.default_rng(0)
    shapes = [(batch, time, heads, head_dim), *[(batch, kv_heads, time, head_dim)] * 2]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    weight = rng.normal(size=shapes[0]).astype(np.float32)
    # A mask with the kinds that the kernel takes: segments, or lengths, behind which anything may stand.
    lengths = np.array([time, time // 3], np.int32)
    weight[np.arange(time)[None] >= lengths[:, None]] = 0.0
    segments: dict[str, Any] = {"lengths": lengths}
    if packed:
        segments = {"segment_ids": np.repeat(np.arange(8, dtype=np.int32), time // 8)[None].repeat(batch, 0)}
    narrow = None if window is None else min(window, time // 4)

    def value(*arrays):
        out = KERNELS[kernel](*arrays, causal_mask(time, narrow, **segments))
        return jnp.sum(out * weight), out * weight

    gradients, out = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(a, np.float32) for a in (out, *gradients)]
