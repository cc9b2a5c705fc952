"""What each device holds in the course of a run, counted from shapes alone.

State is exact: it follows from shapes and shardings. What a program holds while it runs is counted from what its
backward pass keeps, at the three moments of an optimizer step that may take most. Against the compiler's own account
of the compiled step (float32 on the CPU; none, save and full; one device, and eight as ddp, fsdp and tensor) the sum
is within 20%, where it is above 50 MiB.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrft.config import RLConfig
from jaxrft.data.batching import bucket_length
from jaxrft.models.decoder import Decoder
from jaxrft.models.logprobs import logits_elements
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import Layout, describe
from jaxrft.parallel.rules import SHARDING_AXES

FLOAT32 = 4
# Prompt tokens that the native engine runs at once.
PREFILL_TOKENS = 8192

Items = dict[str, float]


class Sizes:
    """The numbers of one device that the counts are made of.

    Args:
        remat: the policy, ``auto`` resolved.
    """

    def __init__(self, config: RLConfig, spec: DecoderSpec, layout: Layout, remat: str):
        self.config, self.spec, self.layout = config, spec, layout
        self.scan, mesh = config.memory.scan_layers, layout.mesh.shape
        self.tensor, self.sequence = mesh["tensor"], mesh["sequence"]
        self.platform = layout.mesh.devices.flat[0].platform
        # XLA's CPU compiler drops the barriers that keep it from merging what is computed again with what was
        # computed before: in layers that are not a loop, it keeps everything.
        self.remat = "none" if self.platform == "cpu" and not self.scan else remat
        self.itemsize = jnp.dtype(config.model.dtype).itemsize
        self.casts = self.itemsize != jnp.dtype(config.model.param_dtype).itemsize
        self.rows, self.time, self.picks = _rows(config, self.sequence)
        self.tokens = self.rows * self.time / self.sequence
        self.vocab = spec.vocab_size / (self.tensor if spec.vocab_size % self.tensor == 0 else 1)
        self.state = describe(_abstract(spec, config.model.param_dtype), layout)

    @property
    def shares_params(self) -> bool:
        """Whether parameters lie sharded, and are gathered for use."""
        return self.layout.shards("params") and self.shares_state

    @property
    def shares_state(self) -> bool:
        return any(self.layout.mesh.shape[axis] > 1 for axis in SHARDING_AXES)

    @property
    def host_is_apart(self) -> bool:
        """Whether the host's memory is another than the device's; a limit that is set stands for such a device."""
        return self.platform != "cpu" or self.config.memory.device_gib is not None

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
        """One float32 array of attention scores of a layer."""
        return FLOAT32 * self.tokens * self.time * self.spec.num_heads / self.tensor

    def bytes_of(self, channels: float) -> float:
        """A tensor of so many channels over the device's tokens."""
        return self.tokens * channels * self.itemsize

    @property
    def whole_layer(self) -> float:
        """All that the gradient of one layer needs of its forward pass."""
        # The stream before and after attention, each with its norm, all that has a name, and the gated product.
        channels = 3 * self.spec.hidden_size + sum(self.widths.values()) + self.spec.intermediate_size / self.tensor
        # Attention's weights: float32 for the softmax's gradient, and as they enter the product.
        return self.bytes_of(channels) + self.score_bytes * (1 + self.itemsize / FLOAT32)

    @property
    def kept_layer(self) -> float:
        """What one layer keeps from the forward to the backward pass."""
        if self.remat in ("full", "offload"):
            return self.bytes_of(self.spec.hidden_size)
        if self.remat == "save":
            return self.bytes_of(sum(self.widths[name] for name in {"layer_input", *self.config.memory.remat_names}))
        if self.platform != "cpu" or self.scan:
            return self.whole_layer
        # Merged with the backward pass as well: both normed streams, the gate's sigmoid, half of the rotations.
        merged = 2 * self.spec.hidden_size + self.widths["gate"] + (self.widths["query"] + self.widths["key"]) / 2
        return self.whole_layer + self.bytes_of(merged)

    @property
    def working_layer(self) -> float:
        """What the layer holds beside that, whose gradient is being computed."""
        spec, widths = self.spec, self.widths
        # Cotangents of the feed-forward block or, when these are gone, of attention.
        inner = 4 * self.bytes_of(widths["gate"])
        attention = self.bytes_of(widths["query"] * 2 + widths["key"] * 2) + self.score_bytes
        cotangents = 4 * self.bytes_of(spec.hidden_size) + max(inner, attention - inner)
        # In a loop, its share of what was kept is taken out of the whole; else it is there, or computed again.
        again = 0 if self.remat == "none" and not self.scan else self.whole_layer
        return cotangents + again


def _rows(config: RLConfig, sequence: int) -> tuple[int, int, float]:
    """Rows of a micro-batch on one device, their length, and the tokens of each that are projected on a device."""

    def whole(length: int) -> int:
        return length + -length % sequence

    longest = whole(bucket_length(config.max_prompt_length + config.max_completion_length, minimum=8))
    rows, time = config.per_device_train_batch_size, longest
    picks = min(bucket_length(config.max_completion_length, minimum=4), time)
    if config.batching.pack:
        time = whole(config.batching.row_length or longest)
        rows = max(1, (config.batching.tokens_per_device or rows * longest) // time)
        # Short prompts leave nearly all of a row to responses.
        picks = time
    return rows, time, picks if sequence == 1 else time / sequence


@functools.lru_cache(maxsize=8)
def _abstract(spec: DecoderSpec, dtype: str) -> Any:
    model = nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), nnx.state(model, nnx.Param))


def state_items(sizes: Sizes, reference: bool) -> Items:
    """What stays on the devices through all phases."""
    memory, apart = sizes.config.memory, sizes.host_is_apart
    return {
        "parameters": sizes.state.param_bytes,
        "optimizer moments": 0 if memory.offload_optimizer and apart else sizes.state.moment_bytes,
        "reference": sizes.state.param_bytes if reference and not (memory.offload_reference and apart) else 0,
    }


def update_items(sizes: Sizes, reference: bool) -> Items:
    """What an update holds beside the state, at the moment at which it holds most."""
    state, memory = sizes.state, sizes.config.memory
    always: Items = {}
    if sizes.config.gradient_accumulation_steps > 1 or sizes.config.batching.pack:
        always["sum of gradients"] = state.gradient_bytes
    if sizes.platform == "cpu":
        # XLA's CPU compiler reads moments in one loop and writes them in another: it copies them first.
        always["copies of moments"] = state.moment_bytes
    moments = [_layers(sizes), _projection(sizes), _optimizer(sizes)]
    found = always | max(moments, key=lambda items: sum(items.values()))
    if reference and memory.offload_reference:
        scoring = {"reference": state.param_bytes, "scoring": sizes.whole_layer + _logits(sizes)}
        found = max(found, scoring, key=lambda items: sum(items.values()))
    return found


def _activations(sizes: Sizes) -> Items:
    items = {"activations kept": sizes.spec.num_layers * sizes.kept_layer}
    if sizes.scan:
        items["layers stacked"] = sizes.of_layers("param_bytes")
    if sizes.shares_params or sizes.casts:
        # Not computed again: the compiler finds that backward and forward pass gather and cast the same.
        shared = sizes.remat == "none" and not sizes.scan
        items["parameters in use"] = (sizes.spec.num_layers if shared else 1) * sizes.layer_elements * sizes.itemsize
    return items


def _layers(sizes: Sizes) -> Items:
    """When the backward pass enters the layers."""
    # The table's gradient is there, and where gradients are sharded, one layer's whole ones.
    gradients = sizes.state.gradient_bytes - sizes.of_layers("gradient_bytes")
    if sizes.shares_params:
        gradients += sizes.layer_elements * FLOAT32
    if sizes.scan:
        gradients += sizes.of_layers("gradient_bytes")
    return _activations(sizes) | {"gradients": gradients, "activations of one layer": sizes.working_layer}


def _projection(sizes: Sizes) -> Items:
    """When the output projection is differentiated."""
    # The kernel in its type, its gradient's sum, and a chunk's share of that.
    kernel = sizes.table_elements * (2 * FLOAT32 + sizes.itemsize)
    # What is projected: gathered, masked, and their cotangents.
    hidden = 4 * sizes.rows * sizes.picks * sizes.spec.hidden_size * sizes.itemsize
    return _activations(sizes) | {"output projection": kernel + hidden + 2 * _logits(sizes)}


def _logits(sizes: Sizes) -> float:
    return FLOAT32 * min(logits_elements(), sizes.rows * sizes.picks * sizes.vocab)


def _optimizer(sizes: Sizes) -> Items:
    """When parameters are changed: activations are gone."""
    state = sizes.state
    items: Items = {"gradients": state.gradient_bytes}
    if sizes.config.gradient_accumulation_steps > 1 or sizes.config.batching.pack:
        items["gradients"] = 0  # They are in the sum.
    if sizes.scan:
        items["gradients"] = sizes.of_layers("gradient_bytes")
    if sizes.shares_state and not sizes.layout.shards("params"):
        # Each device changes its share, and the whole is gathered from these.
        items["parameters changed"] = state.param_bytes
    if sizes.config.memory.offload_optimizer:
        items["moments from the host"] = state.moment_bytes
    return items


def rollout_items(sizes: Sizes) -> Items:
    """What the engine holds beside the state while it generates."""
    config, spec, mesh = sizes.config, sizes.spec, sizes.layout.mesh.shape
    devices = mesh["replica"] * mesh["fsdp"] * mesh["sequence"]
    slots = max(min(config.rollout.max_slots, config.rollout_samples) / devices, 1)
    kv_heads = spec.num_kv_heads / (sizes.tensor if spec.num_kv_heads % sizes.tensor == 0 else 1)
    entry = 2 * kv_heads * spec.head_dim * sizes.itemsize
    longest = bucket_length(config.max_prompt_length + config.max_completion_length)
    whole = describe(
        _abstract(spec, config.model.param_dtype), dataclasses.replace(sizes.layout, strategy="ddp")
    ).param_bytes
    return {
        "engine's parameters": whole if sizes.shares_params else 0,
        # Cast once for all tokens of a chunk.
        "parameters in use": whole * sizes.itemsize / jnp.dtype(config.model.param_dtype).itemsize if sizes.casts else 0,
        # One layer is there twice while caches grow.
        "caches": slots * longest * entry * (spec.num_layers + 1),
        "prompts and logits": max(_prompts(sizes, entry, devices), 3 * slots * spec.vocab_size * FLOAT32),
    }


def _prompts(sizes: Sizes, entry: float, devices: int) -> float:
    """Prompts that are run at once: their caches, one layer's activations, and logits."""
    config, spec = sizes.config, sizes.spec
    time = bucket_length(config.max_prompt_length)
    prompts = max(min(PREFILL_TOKENS // time, config.rollout_prompts), 1) / devices
    scores = 2 * FLOAT32 * time * spec.num_heads / sizes.tensor
    layer = (4 * spec.hidden_size + 3 * spec.intermediate_size / sizes.tensor) * sizes.itemsize + scores
    return max(prompts, 1) * (time * (entry * spec.num_layers + layer) + 2 * spec.vocab_size * FLOAT32)
