"""Flash attention for torch's packed rows, where torch has it: torch.nn.attention.varlen, on GPUs, in 16 bits."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

NAME = "varlen"


class Varlen:
    """An attention of transformers' that sees each segment of packed rows alone.

    Attributes:
        lengths: tokens of each segment of the rows under way, in their order [segments].
    """

    def __init__(self, dtype: Any) -> None:
        from torch.nn.attention.varlen import varlen_attn
        from transformers import AttentionInterface

        self._attend, self._dtype = varlen_attn, dtype
        self._places: tuple[Any, int] | None = None
        AttentionInterface.register(NAME, self._forward)

    def use(self, lengths: np.ndarray, device: Any) -> None:
        """Sets the segments of the rows that run next; until then no other rows may run."""
        import torch

        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self._places = torch.tensor(ends, device=device), int(lengths.max())

    def _forward(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        """Of [batch, heads, time, head_dim]; gives [batch, time, heads, head_dim]."""
        assert mask is None
        assert self._places is not None
        batch, heads, time, head_dim = query.shape
        # Rows one behind the other: no segment goes from one to the next.
        flat = (a.to(self._dtype).transpose(1, 2).flatten(0, 1) for a in (query, key, value))
        out = self._attend(*self._repeated(*flat), *self._twice(), **self._options())
        return out.view(batch, time, heads, head_dim), None

    def _twice(self) -> tuple[Any, Any, int, int]:
        ends, longest = self._places  # type: ignore[misc]
        return ends, ends, longest, longest

    def _options(self) -> dict[str, Any]:
        """Causal, as this version of torch is told."""
        known = inspect.signature(self._attend).parameters
        options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        return options | ({"enable_gqa": True} if "enable_gqa" in known else {})

    def _repeated(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        if "enable_gqa" in inspect.signature(self._attend).parameters:
            return query, key, value
        group = query.shape[1] // key.shape[1]
        return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Tokens of each segment, row after row, the padding behind the last one a segment of its own.

    Args:
        segments: ids [rows, time].
    """
    starts = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return np.diff(np.append(np.flatnonzero(starts), segments.size))
