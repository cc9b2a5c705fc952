"""What a decoder is made of: the one description that every family maps to."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding.

    ``kind`` is ``default``, ``linear`` (positions divided by ``factor``) or ``llama3``
    (low frequencies divided by ``factor``, with a smooth passage between the two bounds).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Shape and options of a dense decoder; hashable, so that it can be a static argument."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: RopeSpec = RopeSpec()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    # Per layer: keys further back than this many tokens are not seen (None: all are).
    sliding_windows: tuple[int | None, ...] = ()
    # Standard deviation of new kernels and embeddings.
    init_stddev: float = 0.02

    def sliding_window(self, layer: int) -> int | None:
        """Sliding window of one layer, None where the layer sees all."""
        return self.sliding_windows[layer] if self.sliding_windows else None
