"""Model families. A family is a declaration: config.json <-> spec, and the table of names.

``docs/add-a-family.md`` shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.models.hf_config import common_fields, common_options, complete, window_fields, windows_by_layer
from jaxrft.models.names import DECODER_NAMES, TensorName
from jaxrft.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one Hugging Face model type maps to our decoder.

    ``options`` and ``fields`` say only what is this family's own; what all share is
    :func:`common_options` and :func:`common_fields`.
    """

    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The class in ``architectures`` of an exported config.json."""
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Complete config -> further arguments of :class:`DecoderSpec`."""
    fields: Callable[[DecoderSpec], dict[str, Any]]
    """Spec -> the config.json fields that ``options`` reads."""
    names: tuple[TensorName, ...] = DECODER_NAMES
    """Hugging Face tensor names and ours."""

    def spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """The decoder of a complete config (:func:`jaxrft.models.hf_config.complete`)."""
        return DecoderSpec(**{**common_options(config), **self.options(config)})

    def config(self, spec: DecoderSpec) -> dict[str, Any]:
        """The config.json of a decoder."""
        identity = {"model_type": self.model_type, "architectures": [self.architecture]}
        return {**identity, **common_fields(spec), **self.fields(spec)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    options=lambda config: {"qkv_bias": True, "sliding_windows": windows_by_layer(config)},
    fields=window_fields,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    options=lambda config: {
        "qk_norm": True,
        "qkv_bias": config["attention_bias"],
        "output_bias": config["attention_bias"],
        "sliding_windows": windows_by_layer(config),
    },
    fields=lambda spec: {"attention_bias": spec.qkv_bias, **window_fields(spec)},
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    options=lambda config: {
        "qkv_bias": config["attention_bias"],
        "output_bias": config["attention_bias"],
        "mlp_bias": config["mlp_bias"],
    },
    fields=lambda spec: {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias},
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    options=lambda config: {
        "sliding_windows": (config["sliding_window"],) * config["num_hidden_layers"] if config["sliding_window"] else ()
    },
    fields=lambda spec: {"sliding_window": spec.sliding_window(0)},
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2, QWEN3, LLAMA, MISTRAL)}


def supported_families() -> tuple[str, ...]:
    """The model types that can be loaded, trained and exported."""
    return tuple(sorted(FAMILIES))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        ConfigError: no ``model_type``, or one that we do not have.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type: got {model_type!r}, takes one of {', '.join(supported_families())}")
    return FAMILIES[model_type]


def family_for(spec: DecoderSpec) -> Family:
    """A family whose config can say what ``spec`` says.

    Raises:
        ConfigError: no family has this combination of options.
    """
    for family in FAMILIES.values():
        if family.spec(complete(family.config(spec))) == spec:
            return family
    raise ConfigError(f"spec: no family of {', '.join(supported_families())} has a decoder with these options: {spec}")
