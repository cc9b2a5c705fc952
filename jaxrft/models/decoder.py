"""A dense decoder: one implementation for every text family."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrft import parallel
from jaxrft.models.attention import AttentionMask, cache_mask, causal_mask, segment_starts
from jaxrft.models.attention.choice import Use, choose, choose_decode
from jaxrft.models.layers import DecoderLayer, Embedding, LayerCache, Linear, RMSNorm
from jaxrft.models.precision import matmul_precision
from jaxrft.models.projection import leading
from jaxrft.models.rope import rope_tables
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.stack import Remat, run_layers


class Decoder(nnx.Module):
    """A causal language model.

    Args:
        spec: its shape and options.
        dtype: type that activations are computed in; parameters are float32.
        rngs: keys for new parameters.

    Attributes:
        remat: what the backward pass keeps of each layer.
        scan_layers: whether ``hidden`` runs the layers in a loop.
        attention: which implementation attends, of ``jaxrft.models.attention.choice.CHOICES``.
    """

    def __init__(self, spec: DecoderSpec, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.spec = spec
        self.dtype = dtype
        self.remat = Remat()
        self.scan_layers = False
        self.attention = "auto"
        # The config.json and generation_config.json that the model came with, as text: static and hashable.
        self.hf_config: str | None = None
        self.generation_config: str | None = None
        stddev = spec.init_stddev
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, stddev=stddev, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(spec, rngs=rngs) for _ in range(spec.num_layers)])
        self.final_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        if not spec.tie_embeddings:
            options: dict[str, Any] = {"bias": False, "stddev": stddev, "rngs": rngs}
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, ("embed", "vocab"), **options)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"] | None = None,
        *,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        media: Any = None,
    ) -> Float[Array, "batch time vocab"]:
        """Logits, float32. For looking at a model; training goes through ``hidden``."""
        hidden = self.hidden(tokens, lengths, positions=positions, segment_ids=segment_ids, media=media)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"] | None = None,
        *,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        media: Any = None,
    ) -> Float[Array, "batch time hidden"]:
        """What the output projection consumes.

        Args:
            tokens: right-padded rows, or rows packed with several segments.
            lengths: valid tokens of each row; what stands behind them means nothing.
            positions: position of each token; None counts from 0 in each row, or in each segment.
            segment_ids: equal for tokens that may see each other, which stand side by side.
            media: embeddings of images, video or audio; text decoders take none.
        """
        if media is not None:
            raise ValueError("media: this is a text model; it takes none")
        x, rope, masks = self._start(tokens, lengths, positions, segment_ids, scan=self.scan_layers)
        windows = list(masks)
        chosen = [windows.index(self.spec.sliding_window(index)) for index in range(self.spec.num_layers)]
        x = run_layers(self.layers, x, rope, list(masks.values()), chosen, remat=self.remat, scan=self.scan_layers)
        return self.final_norm(x)

    def prefill(
        self, tokens: Int[Array, "batch time"], lengths: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch hidden"], list[LayerCache]]:
        """Hidden state of each row's last valid token, and every layer's keys and values."""
        x, rope, masks = self._start(tokens, lengths, None, None)
        caches = []
        for index, layer in enumerate(self.layers):
            x, cache = layer(x, rope, masks[self.spec.sliding_window(index)])
            caches.append(cache)
        return self.final_norm(x)[jnp.arange(tokens.shape[0]), lengths - 1], caches

    def decode(
        self, tokens: Int[Array, "slots"], positions: Int[Array, "slots"], caches: list[LayerCache], window: int
    ) -> tuple[Float[Array, "slots hidden"], list[LayerCache]]:
        """One more token for each slot.

        Args:
            tokens: the newest token of each slot.
            positions: where it stands: the number of tokens before it.
            caches: one a layer, of any length above ``positions``.
            window: static; only the first ``window`` cached tokens are looked at. Above every position.
        """
        rope = rope_tables(positions[:, None], self.spec.rope, self.spec.head_dim)
        kernel = choose_decode(self.attention, self._use(window, parallel.current()))
        masks = {w: cache_mask(positions, w, kernel) for w in self._windows()}
        x, new = self.embed(tokens[:, None]), []
        for index, (layer, cache) in enumerate(zip(self.layers, caches)):
            x, cache = layer.decode(x, rope, cache, masks[self.spec.sliding_window(index)], window)
            new.append(cache)
        return self.final_norm(x)[:, 0], new

    def reads_whole_caches(self, length: int) -> bool:
        """Whether ``decode`` looks at caches of this length as far as they go, and not at what each slot has alone."""
        return choose_decode(self.attention, self._use(length, parallel.current())) == "dense"

    def init_cache(self, slots: int, length: int) -> list[LayerCache]:
        """Empty caches for ``decode``."""
        shape = (slots, self.spec.num_kv_heads, length, self.spec.head_dim)
        return [LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in self.layers]

    @property
    def output_kernel(self) -> Float[Array, "hidden vocab"]:
        """The output projection; of tied models, the transposed embedding."""
        if self.spec.tie_embeddings:
            return self.embed.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... vocab"]:
        """Output projection, float32."""
        kernel = parallel.gather(self.output_kernel.astype(hidden.dtype), ("embed", "vocab"))
        precision = matmul_precision(hidden.dtype)
        logits = jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=jnp.float32)
        return parallel.constrain(logits, (*leading(logits), None))

    def _windows(self) -> list[int | None]:
        """Every sliding window that occurs, in the order of the layers."""
        return list(dict.fromkeys(self.spec.sliding_window(index) for index in range(self.spec.num_layers)))

    def _use(self, keys: int, layout: parallel.Layout | None) -> Use:
        """What attention over rows of so many keys is wanted for."""
        return Use(
            platform="cpu" if jax.default_backend() == "cpu" else "gpu",
            dtype=jnp.dtype(self.dtype).name,
            head_dim=self.spec.head_dim,
            keys=keys,
            shares_time=layout is not None and not layout.decoding and layout.mesh.shape["sequence"] > 1,
        )

    def _start(self, tokens, lengths, positions, segment_ids, scan=False):
        """What goes into the first layer, the rotary tables, and the mask of each window that occurs."""
        if positions is None:
            positions = default_positions(tokens, segment_ids)
        rope = rope_tables(positions, self.spec.rope, self.spec.head_dim)
        windows = self._windows()
        use = self._use(tokens.shape[1], parallel.current())
        use = dataclasses.replace(use, packed=segment_ids is not None, mixed=scan and len(windows) > 1)

        def mask(window: int | None) -> AttentionMask:
            kernel = choose(self.attention, dataclasses.replace(use, window=None if use.mixed else window))
            made = causal_mask(tokens.shape[1], window, segment_ids, lengths, kernel)
            # One program serves all layers of a loop: what is static must be the same.
            return dataclasses.replace(made, window=None) if use.mixed else made

        return self.embed(tokens), rope, {window: mask(window) for window in windows}


def default_positions(
    tokens: Int[Array, "batch time"], segment_ids: Int[Array, "batch time"] | None
) -> Int[Array, "batch time"]:
    """Positions that count from 0 in each row, or from each start of a new segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return index if segment_ids is None else index - segment_starts(segment_ids)
