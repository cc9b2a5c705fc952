"""Data sets that are computed, for examples and tests."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jaxrft.config import ConfigError


def addition(
    split: Literal["train", "test"], *, digits: int = 2, held_out: float = 0.1, seed: int = 0
) -> list[dict[str, Any]]:
    """Sums of two numbers, as ``{"prompt": "12+34=", "answer": "46", "a": 12, "b": 34}``.

    Both numbers run from 0 to ``10**digits - 1`` and are written without leading zeros. What is held
    out is drawn among unordered pairs: where ``12+34`` is in the test split then so is ``34+12``, and
    neither is in the training split. The rows of a split come in an order drawn from the seed, so that
    its first rows are a fair sample of it.

    Args:
        split: ``train``, or ``test`` for the held-out sums.
        digits: digits of the largest number, 1 to 3.
        held_out: share of the unordered pairs that is held out.
        seed: seed of what is held out and of the order; the splits belong together when it is the same.

    Raises:
        ConfigError: a split, ``digits`` or ``held_out`` that cannot be.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"addition: got split {split!r}, takes train or test")
    if digits not in (1, 2, 3):
        raise ConfigError(f"addition: got digits={digits}, takes 1, 2 or 3")
    if not 0 < held_out < 1:
        raise ConfigError(f"addition: got held_out={held_out}, takes a share between 0 and 1")
    small, large = np.triu_indices(10**digits)
    # Raw Philox numbers are the same in all versions of NumPy.
    bits = np.random.Philox(np.random.SeedSequence((seed, digits)))
    order = np.argsort(bits.random_raw(len(small)), kind="stable")
    cut = min(max(round(held_out * len(small)), 1), len(small) - 1)
    pairs = order[:cut] if split == "test" else order[cut:]
    a, b = small[pairs], large[pairs]
    mirrored = a != b
    a, b = np.concatenate([a, b[mirrored]]), np.concatenate([b, a[mirrored]])
    shuffle = np.argsort(bits.random_raw(len(a)), kind="stable")
    return [
        {"prompt": f"{x}+{y}=", "answer": str(x + y), "a": x, "b": y}
        for x, y in zip(a[shuffle].tolist(), b[shuffle].tolist())
    ]


def addition_train(*, digits: int = 2, held_out: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    """The training split of :func:`addition`."""
    return addition("train", digits=digits, held_out=held_out, seed=seed)


def addition_test(*, digits: int = 2, held_out: float = 0.1, seed: int = 0) -> list[dict[str, Any]]:
    """The held-out split of :func:`addition`."""
    return addition("test", digits=digits, held_out=held_out, seed=seed)
