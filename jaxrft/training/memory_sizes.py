"""The numbers of one device that its memory is counted from: shapes, shares, and what one layer keeps."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrft.config import ConfigError, RLConfig
from jaxrft.data.batching import halvings
from jaxrft.models.abstract import abstract_decoder
from jaxrft.models.attention import KERNELS, aligned_kv_heads
from jaxrft.models.attention.choice import Use, choose
from jaxrft.models.attention.chunked import ACCELERATOR_BLOCKS, BLOCKS
from jaxrft.models.attention.cudnn_packed import most_segments
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import Layout, describe
from jaxrft.parallel.description import Description
from jaxrft.parallel.rules import SHARDING_AXES

FLOAT32 = 4


class Sizes:
    """The numbers of one device that the counts are made of.

    Args:
        remat: the policy, ``auto`` resolved.
        platform: of the devices; None: of those in the mesh.
        held_out: prompts of an evaluation.
        greedy: whether each prompt of a rollout is also answered by itself, greedily.
    """

    def __init__(
        self,
        config: RLConfig,
        spec: DecoderSpec,
        layout: Layout,
        remat: str,
        platform: str | None = None,
        held_out: int = 0,
        greedy: bool = False,
    ):
        self.config, self.spec, self.layout = config, spec, layout
        self.scan, mesh = config.memory.scan_layers, layout.mesh.shape
        self.tensor, self.sequence = mesh["tensor"], mesh["sequence"]
        self.platform = platform or layout.mesh.devices.flat[0].platform
        # XLA's CPU compiler drops the barriers that keep it from merging what is computed again with what was
        # computed before: in layers that are not a loop, it keeps everything.
        self.remat = "none" if self.platform == "cpu" and not self.scan else remat
        self.itemsize = jnp.dtype(config.model.dtype).itemsize
        self.param_itemsize = jnp.dtype(config.model.param_dtype).itemsize
        self.rows, self.time, self.picks = _rows(config, self.sequence)
        self.tokens = self.rows * self.time / self.sequence
        self.vocab = spec.vocab_size / (self.tensor if spec.vocab_size % self.tensor == 0 else 1)
        self.attention = self._attention()
        # Prompts that the engine is given at a time, and completions of each.
        self.calls = [(config.rollout_prompts, config.num_generations)]
        self.calls += [(config.rollout_prompts, 1)] if greedy else []
        self.calls += [(held_out, config.num_generations_eval)] if held_out else []
        self.calls += [(held_out, 1)] if held_out and config.warm_start.max_steps else []
        self.state = _described(spec, config.model.param_dtype, layout)
        self.whole = _described(spec, config.model.param_dtype, dataclasses.replace(layout, strategy="ddp"))

    def _attention(self) -> str:
        """How attention over the rows of a micro-batch is computed; of several ways, that which takes most memory.

        Raises:
            ConfigError: the one that is asked for cannot do it.
        """
        windows = {self.spec.sliding_window(layer) for layer in range(self.spec.num_layers)}
        mixed = self.scan and len(windows) > 1
        use = Use(
            platform=self.platform,
            dtype=self.config.model.dtype,
            head_dim=self.spec.head_dim,
            keys=self.time,
            packed=self.config.batching.pack,
            shares_time=self.sequence > 1,
            mixed=mixed,
            here=self.platform == jax.default_backend(),
        )
        uses = [use] if mixed else [dataclasses.replace(use, window=window) for window in windows]
        try:
            return max((choose(self.config.model.attention, use) for use in uses), key=list(KERNELS)[::-1].index)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error

    @property
    def casts(self) -> bool:
        """Whether parameters are kept in another type than that of computation."""
        return self.itemsize != self.param_itemsize

    @property
    def shares_params(self) -> bool:
        """Whether parameters lie sharded, and are gathered for use."""
        return self.layout.shards("params") and self.shares_state

    @property
    def shares_state(self) -> bool:
        """Whether there are devices to shard state over."""
        return any(self.layout.mesh.shape[axis] > 1 for axis in SHARDING_AXES)

    @property
    def host_is_apart(self) -> bool:
        """Whether the host's memory is another than the device's."""
        return self.platform != "cpu"

    @property
    def table_elements(self) -> float:
        """Of the embedding, or of the output projection, as it is used."""
        return self.vocab * self.spec.hidden_size

    @property
    def layer_elements(self) -> float:
        """Parameters of one layer as they are used."""
        spec = self.spec
        attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
        return (attention + 3 * spec.hidden_size * spec.intermediate_size) / self.tensor

    def of_layers(self, kind: str) -> float:
        """Bytes of all layers' ``param_bytes`` or ``gradient_bytes``."""
        return sum(getattr(place, kind) for place in self.state.places if place.name.startswith("layers."))

    @property
    def widths(self) -> dict[str, float]:
        """Channels of the tensors that have names."""
        spec, inner = self.spec, self.spec.intermediate_size / self.tensor
        heads = spec.num_heads * spec.head_dim / self.tensor
        kv = spec.num_kv_heads * spec.head_dim / min(self.tensor, spec.num_kv_heads)
        return {
            "layer_input": spec.hidden_size, "query": heads, "key": kv, "value": kv, "attention": heads,
            "gate": inner, "up": inner,
        }  # fmt: skip

    @property
    def score_bytes(self) -> float:
        """One float32 array of attention scores of a layer, where there are such arrays."""
        return self.whole_scores(self.tokens, self.time) if self.attention == "dense" else 0.0

    def whole_scores(self, queries: float, keys: int) -> float:
        """A float32 array of the scores of all heads of a device."""
        return FLOAT32 * queries * keys * self.spec.num_heads / self.tensor

    @property
    def blocked_attention(self) -> tuple[float, float]:
        """What attention without whole scores keeps for the backward pass, and holds in it, beside what has a name."""
        if self.attention == "dense":
            return 0.0, 0.0
        norms = FLOAT32 * self.tokens * self.spec.num_heads / self.tensor
        heads = self.widths["attention"]
        if self.attention == "cudnn" and self.config.batching.pack:
            # For each segment that a row may have. As rows with more are computed otherwise, arguments and result are
            # kept once more, with keys and values of each head; in the backward pass, their cotangents.
            norms *= most_segments(self.time, self.spec.head_dim)
            return norms + self.bytes_of(4 * heads + 2 * self.widths["key"]), norms + self.bytes_of(2 * heads)
        if self.attention == "triton":
            # The gradients of keys and values for each head of the queries, before a group's are summed.
            spec = self.spec
            grouped = spec.num_heads > aligned_kv_heads(spec.num_heads, spec.num_kv_heads, self.tensor)
            return norms, norms + (2 * FLOAT32 * self.tokens * self.sequence * heads if grouped else 0.0)
        if self.attention != "chunked":
            return norms, norms
        # Its result in blocks; in the backward pass the cotangent likewise, the sum of the queries', and a block's
        # scores, weights and cotangents.
        query_block, key_block = BLOCKS.get(self.platform, ACCELERATOR_BLOCKS)
        tile = self.whole_scores(self.rows * min(query_block, self.time), min(key_block, self.time))
        return norms + self.bytes_of(heads), self.bytes_of(heads) + FLOAT32 * self.tokens * heads + 4 * tile

    def bytes_of(self, channels: float) -> float:
        """A tensor of so many channels over the device's tokens."""
        return self.tokens * channels * self.itemsize

    @property
    def whole_layer(self) -> float:
        """All that the gradient of one layer needs of its forward pass."""
        # The stream before and after attention, each with its norm, all that has a name, and the gated product.
        channels = 3 * self.spec.hidden_size + sum(self.widths.values()) + self.spec.intermediate_size / self.tensor
        # Queries and keys before their norms.
        channels += self.widths["query"] + self.widths["key"] if self.spec.qk_norm else 0
        # Attention's weights: float32 for the softmax's gradient, and as they enter the product.
        return self.bytes_of(channels) + self.score_bytes * (1 + self.itemsize / FLOAT32) + self.blocked_attention[0]

    @property
    def kept_layer(self) -> float:
        """What one layer keeps from the forward to the backward pass."""
        if self.remat in ("full", "offload"):
            return self.bytes_of(self.spec.hidden_size)
        if self.remat == "save":
            names = {"layer_input", *self.config.memory.remat_names}
            # What cuDNN keeps has no name: its forward pass runs again.
            named = "attention" in names and self.attention != "cudnn"
            attention = self.blocked_attention[0] if named else 0.0
            return self.bytes_of(sum(self.widths[name] for name in names)) + attention
        if self.platform != "cpu" or self.scan:
            return self.whole_layer
        # Merged with the backward pass as well: both normed streams, the gate's sigmoid, half of the rotations, and
        # the softmax's exponentials.
        merged = 2 * self.spec.hidden_size + self.widths["gate"] + (self.widths["query"] + self.widths["key"]) / 2
        return self.whole_layer + self.bytes_of(merged) + self.score_bytes

    @property
    def working_layer(self) -> float:
        """What the layer holds beside that, whose gradient is being computed."""
        spec, widths = self.spec, self.widths
        # Cotangents of the feed-forward block with its product, or of attention, when that block's three are gone.
        inner = self.bytes_of(widths["gate"])
        attention = self.bytes_of(widths["query"] * 2 + widths["key"] * 2) + self.score_bytes
        attention += self.blocked_attention[1]
        cotangents = 4 * self.bytes_of(spec.hidden_size) + max(4 * inner, attention - 3 * inner)
        # In a loop, its share of what was kept is taken out of the whole; else it is there, or computed again.
        again = 0 if self.remat == "none" and not self.scan else self.whole_layer
        return cotangents + again


def _rows(config: RLConfig, sequence: int) -> tuple[int, int, float]:
    """Rows of a micro-batch on one device, their length, and the tokens of each that are projected on a device."""

    def whole(length: int) -> int:
        return length + -length % sequence

    longest = halvings(config.max_prompt_length + config.max_completion_length, math.lcm(8, sequence))[-1]
    rows, time = config.per_device_train_batch_size, longest
    picks = min(halvings(config.max_completion_length, 4)[-1], time)
    if config.batching.pack:
        time = whole(config.batching.row_length or longest)
        rows = max(1, (config.batching.tokens_per_device or rows * longest) // time)
        # Short prompts leave nearly all of a row to responses.
        picks = time
    return rows, time, picks if sequence == 1 else time / sequence


@functools.lru_cache(maxsize=16)
def _described(spec: DecoderSpec, dtype: str, layout: Layout) -> Description:
    """Where the state of a model with AdamW lies."""
    params = nnx.state(abstract_decoder(spec), nnx.Param)
    return describe(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), params), layout)
