"""Which implementation attends: by device, type, head size, mask and length."""

from __future__ import annotations

import dataclasses
import logging

from jaxrft.models.attention.cudnn_packed import missing_interface
from jaxrft.models.attention.probing import probe
from jaxrft.models.once import Once

logger = logging.getLogger(__name__)

# What a user may ask for.
CHOICES = ("auto", "dense", "chunked", "cudnn", "triton")
# Keys up to which a whole array of scores is faster than blocks of it: on a CPU it is at 384, as fast at 448, and is
# not at 512.
DENSE_KEYS = {"cpu": 448}
ACCELERATOR_DENSE_KEYS = 1024
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)


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


@Once
def choose(wanted: str, use: Use) -> str:
    """The implementation for whole rows, one of ``KERNELS``. Logged once for each use.

    Args:
        wanted: one of ``CHOICES``; ``auto`` takes the first that can: cuDNN, Triton (of packed rows, Triton, cuDNN),
            then whole scores for short rows and blocks of scores for long ones.
        use: what for.

    Raises:
        ValueError: what is wanted cannot do it; the message says why.
    """
    if wanted not in CHOICES:
        raise ValueError(f"attention: got {wanted!r}, takes {', '.join(CHOICES)}")
    if wanted != "auto":
        if reason := refusal(wanted, use):
            raise ValueError(f"attention: got {wanted!r}, which {reason}; takes auto, dense or chunked")
        logger.info("attention: %s for %s, as the configuration asks", wanted, use)
        return wanted
    plain = "dense" if use.keys <= DENSE_KEYS.get(use.platform, ACCELERATOR_DENSE_KEYS) else "chunked"
    refused = []
    for kernel in _kernels(use):
        reason = refusal(kernel, use)
        if reason is None:
            logger.info("attention: %s for %s", kernel, use)
            return kernel
        refused.append(f"{kernel} {reason}")
    logger.info("attention: %s for %s%s", plain, use, "".join(f"; {reason}" for reason in refused))
    return plain


def _kernels(use: Use) -> tuple[str, ...]:
    """The kernels of a GPU, the first to be taken first."""
    if use.platform == "cpu":
        return ()
    # A step of 1.5 billion parameters on packed rows compiled in half a minute with Triton's kernel, and not in 90
    # seconds with cuDNN's, which has a second way in every layer for rows of more segments than it is made for.
    return ("triton", "cudnn") if use.packed else ("cudnn", "triton")


@Once
def choose_decode(wanted: str, use: Use) -> str:
    """The implementation for a slot's newest token: Triton's where it can, else whole scores. Logged once a use."""
    kernel = "triton_decode"
    asked = wanted in ("auto", "triton")
    reason = _decode_refusal(kernel, use) if asked else f"was not asked for, but {wanted}"
    found = kernel if reason is None else "dense"
    logger.info("attention while decoding: %s for %s%s", found, use, "" if reason is None else f"; {kernel} {reason}")
    return found


def _decode_refusal(kernel: str, use: Use) -> str | None:
    if reason := refusal("triton", use):
        return reason
    if use.keys % 16:
        return f"takes caches of a multiple of 16 places, not {use.keys}"
    return probe(kernel, use.dtype, use.head_dim, use.window) if use.here else None


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
    if use.packed and (reason := missing_interface()):
        return reason
    if use.shares_time:
        return "does not take rows that several devices share"
    if use.mixed:
        return "does not take layers with different windows in one loop"
    return _probe(kernel, use)


def _probe(kernel: str, use: Use) -> str | None:
    # Triton's takes no lengths: it is tried on segments whatever the rows are.
    packed = use.packed or kernel == "triton"
    return probe(kernel, use.dtype, use.head_dim, use.window, packed) if use.here else None
