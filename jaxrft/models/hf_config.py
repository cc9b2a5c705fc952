"""What the fields of a Hugging Face config.json mean, where all dense decoders agree on it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.models.spec import DecoderSpec, RopeSpec

ROPE_KINDS = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "swish")
# Fields that config classes read without declaring them.
UNDECLARED_FIELDS = {"model_type", "_name_or_path", "torch_dtype", "rope_theta", "rope_scaling", "head_dim"}


def complete(fields: Mapping[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """``fields`` with every default of transformers' config class, in its newest spelling.

    Args:
        fields: of a config.json whose model_type transformers has.
        strict: refuse fields that the config class does not know.

    Raises:
        ConfigError: values that the config class refuses; with ``strict``, unknown fields.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[fields["model_type"]]
    if strict:
        _refuse_unknown(fields, {field.name for field in dataclasses.fields(config_class)} | UNDECLARED_FIELDS)
    try:
        # A copy in depth, since the class writes its own spelling into nested mappings.
        config = config_class.from_dict(json.loads(json.dumps(dict(fields))))
    except Exception as error:  # the config classes raise many types, their own among them
        reason = re.sub(r"^\w+: ", "", str(error).strip().splitlines()[-1].strip())
        raise ConfigError(f"config of a {fields['model_type']} model: {reason}") from error
    return json.loads(json.dumps(config.to_dict()))


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    for field in sorted(set(fields) - known):
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{field}: the config of a {fields['model_type']} model has no such field{hint}")


def common_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`DecoderSpec` that every family reads from the same fields.

    Args:
        config: as :func:`complete` returns it.

    Raises:
        ConfigError: a field asks for what the decoder does not do.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: got {kv_heads}, takes a divisor of num_attention_heads, {heads}")
    if head_dim % 2:
        raise ConfigError(f"head_dim: got {head_dim}, takes an even number, since rotary positions turn pairs")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"hidden_act: got {config['hidden_act']!r}, takes one of {', '.join(ACTIVATIONS)}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"quantization_config: got method {method!r}; takes checkpoints in float32, bfloat16 or float16"
        )
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": config["max_position_embeddings"],
        "rope": rope_spec(config["rope_parameters"]),
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config["tie_word_embeddings"],
        "init_stddev": config["initializer_range"],
    }


def rope_spec(parameters: Mapping[str, Any]) -> RopeSpec:
    """Rotary embedding of a config's ``rope_parameters``.

    Raises:
        ConfigError: a kind, or a share of rotated channels, that we do not have.
    """
    kind = parameters["rope_type"]
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_type: got {kind!r}, takes one of {', '.join(ROPE_KINDS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor: got {parameters['partial_rotary_factor']}, takes 1")
    options = {"theta": float(parameters["rope_theta"]), "kind": kind}
    if kind != "default":
        options["factor"] = float(parameters["factor"])
    if kind == "llama3":
        options["low_freq_factor"] = float(parameters["low_freq_factor"])
        options["high_freq_factor"] = float(parameters["high_freq_factor"])
        options["original_max_positions"] = parameters["original_max_position_embeddings"]
    return RopeSpec(**options)


def common_fields(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json fields that say what :func:`common_options` reads."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.init_stddev,
        "hidden_act": "silu",
        **rope_fields(spec.rope),
    }


def rope_fields(rope: RopeSpec) -> dict[str, Any]:
    """``rope_parameters``, and the same as ``rope_theta`` and ``rope_scaling`` for readers that know only those."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
    }


def windows_by_layer(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Sliding windows where ``layer_types`` says which layers have one.

    Raises:
        ConfigError: a type of layer that is neither full nor sliding attention.
    """
    kinds = {"full_attention": None, "sliding_attention": config["sliding_window"]}
    for kind in config["layer_types"]:
        if kind not in kinds:
            raise ConfigError(f"layer_types: got {kind!r}, takes {' or '.join(kinds)}")
    windows = tuple(kinds[kind] for kind in config["layer_types"])
    return windows if any(windows) else ()


def window_fields(spec: DecoderSpec) -> dict[str, Any]:
    """The fields that :func:`windows_by_layer` reads, and those that transformers makes them from."""
    windows = [spec.sliding_window(layer) for layer in range(spec.num_layers)]
    if not any(windows):
        return {"use_sliding_window": False, "layer_types": ["full_attention"] * spec.num_layers}
    return {
        "use_sliding_window": True,
        "sliding_window": next(window for window in windows if window),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
