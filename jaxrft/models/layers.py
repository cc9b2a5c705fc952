"""The parts of a decoder layer as Flax NNX modules.

Every parameter carries the logical names of its axes as metadata (``axes``, and ``units`` where an axis consists of
blocks); the table of rules in ``parallel`` maps these to mesh axes. Tensors that a rematerialisation policy may keep
carry names: ``layer_input``, ``query``, ``key``, ``value``, ``attention``, ``gate``, ``up``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrft import parallel
from jaxrft.models.attention import AttentionMask, attend, attend_cached
from jaxrft.models.elementwise import rms_norm, swiglu
from jaxrft.models.joined import JoinedKernel
from jaxrft.models.projection import lookup, project, shift
from jaxrft.models.rope import RopeTables, apply_rope
from jaxrft.models.spec import DecoderSpec


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, each [slots, kv_heads, length, head_dim]."""

    key: Float[Array, "slots kv_heads length head_dim"]
    value: Float[Array, "slots kv_heads length head_dim"]


class Linear(nnx.Module):
    """``x @ kernel + bias``, computed in the type of ``x``.

    Args:
        axes: logical names of the kernel's axes.
        units: blocks of each axis, such as heads, that devices do not divide among them; None: single channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        units: tuple[int, int] | None = None,
        bias: bool,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        units = units or (inputs, outputs)
        init = jax.nn.initializers.normal(stddev)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32), axes=axes, units=units)
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32), axes=axes[1:], units=units[1:]) if bias else None

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """The projection of the last axis."""
        axes, units = parallel.logical_axes(self.kernel)
        # Not indexed: it may be a quantised one.
        return self.shift(project(x, self.kernel.get_value(), axes, units))

    def shift(self, y: Float[Array, "... outputs"]) -> Float[Array, "... outputs"]:
        """Adds the bias, if there is one, to the kernel's product."""
        if self.bias is None:
            return y
        return shift(y, self.bias[...], *parallel.logical_axes(self.bias))


def together(x: Float[Array, "... inputs"], *layers: Linear) -> list[Float[Array, "... outputs"]]:
    """What each of several layers makes of the same input; by one product where their kernels are joined."""
    joined = layers[0].kernel.get_value()
    if not isinstance(joined, JoinedKernel):
        return [layer(x) for layer in layers]
    axes, _ = parallel.logical_axes(layers[0].kernel)
    inputs, outputs = joined.kernel.shape
    y = project(x, joined.kernel, axes, (inputs, outputs))
    ends = np.cumsum(joined.widths)[:-1]
    return [layer.shift(part) for layer, part in zip(layers, jnp.split(y, ends, axis=-1))]


class Embedding(nnx.Module):
    """Token embedding, [vocabulary, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, stddev: float, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        init = jax.nn.initializers.normal(stddev)
        value = init(rngs.params(), (vocab_size, hidden_size), jnp.float32)
        self.embedding = nnx.Param(value, axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time hidden"]:
        """Rows of the table."""
        return lookup(self.embedding[...], tokens, self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in float32."""

    def __init__(self, size: int, *, eps: float, axis: str = "norm"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        """``x`` over its root mean square along the last axis, times the scale; in the type of ``x``."""
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        hidden, heads, kv_heads = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        options: dict[str, Any] = {"stddev": spec.init_stddev, "rngs": rngs}
        kv_options = options | {"units": (hidden, spec.num_kv_heads), "bias": spec.qkv_bias}
        self.query = Linear(
            hidden, heads, ("embed", "heads"), units=(hidden, spec.num_heads), bias=spec.qkv_bias, **options
        )
        self.key = Linear(hidden, kv_heads, ("embed", "kv_heads"), **kv_options)
        self.value = Linear(hidden, kv_heads, ("embed", "kv_heads"), **kv_options)
        self.output = Linear(
            heads, hidden, ("heads", "embed"), units=(spec.num_heads, hidden), bias=spec.output_bias, **options
        )
        if spec.qk_norm:
            self.query_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, axis="head_dim")
            self.key_norm = RMSNorm(spec.head_dim, eps=spec.norm_eps, axis="head_dim")

    def __call__(
        self, x: Float[Array, "batch time hidden"], rope: RopeTables, mask: AttentionMask
    ) -> tuple[Float[Array, "batch time hidden"], LayerCache]:
        """Whole sequences; also returns their keys and values."""
        query, cache = self._project(x, rope)
        return self._finish(attend(query, cache.key, cache.value, mask)), cache

    def decode(
        self,
        x: Float[Array, "slots 1 hidden"],
        rope: RopeTables,
        cache: LayerCache,
        mask: AttentionMask,
        window: int,
    ) -> tuple[Float[Array, "slots 1 hidden"], LayerCache]:
        """One new token a slot: writes it to the cache and attends to what it sees there (``attend_cached``)."""
        query, new = self._project(x, rope)
        heads, cached = attend_cached(query, new, cache, mask, window)
        return self._finish(heads), LayerCache(*cached)

    def _project(self, x: Array, rope: RopeTables) -> tuple[Array, LayerCache]:
        spec, (batch, time) = self.spec, x.shape[:2]
        made = together(x, self.query, self.key, self.value)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        query, key, value = (a.reshape(batch, time, count, spec.head_dim) for a, count in zip(made, heads))
        if spec.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        query, key, value = (checkpoint_name(a, n) for a, n in zip((query, key, value), ("query", "key", "value")))
        return query, LayerCache(key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))

    def _finish(self, heads: Float[Array, "batch time heads head_dim"]) -> Float[Array, "batch time hidden"]:
        return self.output(checkpoint_name(heads, "attention").reshape(*heads.shape[:2], -1))


class MLP(nnx.Module):
    """Gated feed-forward block (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        hidden, inner = spec.hidden_size, spec.intermediate_size
        options: dict[str, Any] = {"bias": spec.mlp_bias, "stddev": spec.init_stddev, "rngs": rngs}
        self.gate = Linear(hidden, inner, ("embed", "mlp"), **options)
        self.up = Linear(hidden, inner, ("embed", "mlp"), **options)
        self.down = Linear(inner, hidden, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        """The block's output, without the residual."""
        gate, up = (checkpoint_name(a, name) for a, name in zip(together(x, self.gate, self.up), ("gate", "up")))
        return self.down(swiglu(gate, up))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, spec: DecoderSpec, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.attention = Attention(spec, rngs=rngs)
        self.mlp_norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.mlp = MLP(spec, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time hidden"], rope: RopeTables, mask: AttentionMask
    ) -> tuple[Float[Array, "batch time hidden"], LayerCache]:
        """Whole sequences; also returns their keys and values."""
        attended, cache = self.attention(self.attention_norm(x), rope, mask)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache

    def decode(
        self,
        x: Float[Array, "slots 1 hidden"],
        rope: RopeTables,
        cache: LayerCache,
        mask: AttentionMask,
        window: int,
    ) -> tuple[Float[Array, "slots 1 hidden"], LayerCache]:
        """One new token a slot; returns the cache with it."""
        attended, cache = self.attention.decode(self.attention_norm(x), rope, cache, mask, window)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache
