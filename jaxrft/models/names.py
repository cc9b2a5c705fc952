"""The table of names: Hugging Face tensor name <-> path in the module tree, with its layout.

One table serves load, export and the transfer of weights to engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

# A parameter's place in the module tree, as ``nnx.to_flat_state`` gives it: ("layers", 0, "mlp", "up", "kernel").
Path = tuple[Any, ...]


class TensorName(NamedTuple):
    """One line of the table; ``{layer}`` in both names stands for the layer's number."""

    name: str
    path: str
    transposed: bool = False


class Tensor(NamedTuple):
    """A tensor of one model: its name in Hugging Face's files, and whether it is stored transposed there."""

    name: str
    transposed: bool


def _linear(name: str, path: str) -> tuple[TensorName, TensorName]:
    """A projection: torch keeps [outputs, inputs], we keep [inputs, outputs]."""
    return TensorName(f"{name}.weight", f"{path}.kernel", transposed=True), TensorName(f"{name}.bias", f"{path}.bias")


# What every dense decoder calls its tensors. Lines whose path a model does not have (biases, q/k norms, the
# output projection of tied models) do not apply to it.
DECODER_NAMES: tuple[TensorName, ...] = (
    TensorName("model.embed_tokens.weight", "embed.embedding"),
    TensorName("model.norm.weight", "final_norm.scale"),
    TensorName("lm_head.weight", "lm_head.kernel", transposed=True),
    TensorName("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.scale"),
    TensorName("model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.mlp_norm.scale"),
    *_linear("model.layers.{layer}.self_attn.q_proj", "layers.{layer}.attention.query"),
    *_linear("model.layers.{layer}.self_attn.k_proj", "layers.{layer}.attention.key"),
    *_linear("model.layers.{layer}.self_attn.v_proj", "layers.{layer}.attention.value"),
    *_linear("model.layers.{layer}.self_attn.o_proj", "layers.{layer}.attention.output"),
    TensorName("model.layers.{layer}.self_attn.q_norm.weight", "layers.{layer}.attention.query_norm.scale"),
    TensorName("model.layers.{layer}.self_attn.k_norm.weight", "layers.{layer}.attention.key_norm.scale"),
    *_linear("model.layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.gate"),
    *_linear("model.layers.{layer}.mlp.up_proj", "layers.{layer}.mlp.up"),
    *_linear("model.layers.{layer}.mlp.down_proj", "layers.{layer}.mlp.down"),
)

# Buffers that older exports carry and that are computed here.
HARMLESS_EXTRAS = re.compile(r"(.*\.)?rotary_emb\.(original_)?inv_freq")


def tensors_of(paths: Iterable[Path], table: Iterable[TensorName]) -> dict[Path, Tensor]:
    """The tensor of each parameter, layer by layer in the order of the table.

    Raises:
        KeyError: a parameter that the table does not name.
    """
    lines = {line.path: (index, line) for index, line in enumerate(table)}
    found = []
    for path in paths:
        pattern = ".".join("{layer}" if isinstance(part, int) else part for part in path)
        if pattern not in lines:
            raise KeyError(f"no line of the table of names has the parameter {pattern}")
        index, line = lines[pattern]
        layer = next((part for part in path if isinstance(part, int)), -1)
        found.append((layer, index, path, Tensor(line.name.replace("{layer}", str(layer)), line.transposed)))
    found.sort(key=lambda entry: entry[:2])
    return {path: tensor for *_, path, tensor in found}
