"""How the logits of an output projection are reduced: by which kernels, of those that work here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.models.once import Once
from jaxrft.models.trial import fault

logger = logging.getLogger(__name__)

# In one kernel with the product (logit_product.py), each chunk of them in one pass by a kernel that reads them
# (logit_kernel.py), or in passes that XLA makes.
Way = Literal["product", "rows", "plain"]


def choose_way(dtype: Any, hidden: int, words: int, transposed: bool) -> Way:
    """The first way that works here; logged once.

    Args:
        dtype: of hidden states and kernel.
        hidden, words: rows and columns of the kernel, on a device.
        transposed: the kernel is [words, hidden].
    """
    if jax.default_backend() == "cpu":
        return "plain"
    return _choose_on_a_gpu(jnp.dtype(dtype).name, hidden, words, transposed)


@Once
def _choose_on_a_gpu(dtype: str, hidden: int, words: int, transposed: bool) -> Way:
    refused = _refusal(dtype, hidden, words, transposed)
    product = refused or product_fault(dtype, transposed)
    rows = product and rows_fault()
    way: Way = "product" if product is None else "rows" if rows is None else "plain"
    reasons = ("one kernel with the product", product), ("a kernel that reads them once", rows)
    why = "".join(f"; {kernel} {reason}" for kernel, reason in reasons if reason)
    fails = rows or (product and not refused)
    logger.log(logging.WARNING if fails else logging.INFO, "logits: reduced by %s%s", way, why)
    return way


def _refusal(dtype: str, hidden: int, words: int, transposed: bool) -> str | None:
    """Why one kernel with the product is not for this; None: it is, if it works."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability != "9.0":
        return f"is for GPUs of compute capability 9.0, not {capability}"
    try:
        from jaxrft.models import logit_product
    except (ImportError, AttributeError) as error:
        return f"cannot be loaded with this version of JAX ({error})"
    return logit_product.refusal(dtype, hidden, words, transposed)


# Tokens, channels and words of a trial: more tiles than a GPU has multiprocessors, more channels than are loaded ahead,
# and neither tokens nor words that fill the last tiles.
TRIAL = (1100, 320, 3904)


@Once
def product_fault(
    dtype: str, transposed: bool, sizes: tuple[int, int, int] = TRIAL, interpret: Any = None
) -> str | None:
    """What is wrong with the kernels' results on a small case; None: nothing is.

    Args:
        sizes: tokens, channels and words.
        interpret: Pallas' parameters to run the kernels without a GPU.
    """
    from jaxrft.models.logit_product import WORDS, cotangents_of, differentiate_product, reduce_product

    rng, (tokens, hidden, words) = np.random.default_rng(0), sizes
    states, kernel = ((rng.normal(size=s) * hidden**-0.25).astype(jnp.dtype(dtype)) for s in (sizes[:2], sizes[1:]))
    weights = kernel.T if transposed else kernel
    places, sharpness = rng.integers(-9, words + 9, tokens).astype(np.int32), rng.uniform(0.5, 2, tokens)
    how: dict[str, Any] = {"transposed": transposed, "interpret": interpret}
    logits = np.asarray(states, np.float64) @ np.asarray(kernel, np.float64)
    target = np.arange(words) == places[:, None]
    rows = [
        row.astype(np.float32) for row in (sharpness, *_of_a_softmax(logits, sharpness), *rng.normal(size=(2, tokens)))
    ]

    def reduced() -> Sequence[np.ndarray]:
        return jax.device_get(jax.jit(functools.partial(reduce_product, **how))(states, weights, places, rows[0]))

    def expected() -> Sequence[np.ndarray]:
        tiles, there = (a[:, : words // WORDS * WORDS].reshape(tokens, -1, WORDS) for a in (logits, target))
        peaks = tiles.max(-1)
        shifted = (tiles - peaks[:, :, None]) * sharpness[:, None, None]
        parts = peaks, np.exp(shifted).sum(-1), (np.exp(shifted) * shifted).sum(-1), (tiles * there).sum(-1)
        return [part.T for part in parts]

    def differentiated() -> Sequence[np.ndarray]:
        program = jax.jit(functools.partial(differentiate_product, **how))
        return apart(np.asarray(program(states, weights, places, cotangents_of(*rows)), np.float32))

    def apart(cotangents: np.ndarray) -> Sequence[np.ndarray]:
        # The targets' are larger by far: beside them nothing would be seen of the others.
        return np.where(target, cotangents, 0), np.where(target, 0, cotangents)

    if reason := fault(reduced, expected, ("peaks", "sums", "moments", "targets"), 1e-4):
        return reason
    names = ("cotangents of targets", "cotangents of other words")
    # Of 16 bits.
    return fault(differentiated, lambda: apart(_cotangents(logits, target, *rows)), names, 1e-2)


def _of_a_softmax(logits, sharpness):
    """Entropy, largest logit and log of the norm."""
    peak = logits.max(-1)
    shifted = (logits - peak[:, None]) * sharpness[:, None]
    norm = np.exp(shifted).sum(-1)
    return np.log(norm) - (np.exp(shifted) * shifted).sum(-1) / norm, peak, np.log(norm)


def _cotangents(logits, target, sharpness, entropy, peak, log_norm, d_logprobs, d_entropy):
    rows = (row[:, None] for row in (sharpness, entropy, peak, log_norm, d_logprobs, d_entropy))
    sharpness, entropy, peak, log_norm, d_logprobs, d_entropy = map(np.float64, rows)
    log_p = (logits - peak) * sharpness - log_norm
    return (target * d_logprobs - np.exp(log_p) * (d_logprobs + d_entropy * (log_p + entropy))) * sharpness


@Once
def rows_fault() -> str | None:
    """What is wrong, on a small case, with the kernel that reads logits once; None: nothing is."""
    # Pallas is loaded where it is used.
    from jaxrft.models.logit_kernel import reduce_rows

    rng = np.random.default_rng(0)
    # Of blocks that are whole and of one that is not.
    logits = rng.normal(size=(5, 5000)).astype(np.float32) * 5
    places, sharpness = np.array([0, 77, 4999, -1, 5000], np.int32), np.full(5, 0.8, np.float32)

    def expected() -> Sequence[np.ndarray]:
        peaks = logits.max(-1)
        shifted = (np.float64(logits) - peaks[:, None]) * 0.8
        inside = (places >= 0) & (places < logits.shape[1])
        chosen = np.where(inside, logits[np.arange(5), np.where(inside, places, 0)], 0)
        return peaks, np.exp(shifted).sum(-1), (np.exp(shifted) * shifted).sum(-1), chosen

    names = ("peaks", "sums", "moments", "targets")
    return fault(lambda: jax.device_get(jax.jit(reduce_rows)(logits, places, sharpness)), expected, names, 1e-4)
