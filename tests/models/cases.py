"""Tiny random models of every family, made by transformers in torch: what ours are compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from jaxrft import models

VOCAB = 61
SHAPE = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Odd head counts, tied and untied, with and without bias, both spellings of the rotary fields, and windows
# that are shorter than the sequences.
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2-windows": {
        "model_type": "qwen2",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_theta": 500.0,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rms_norm_eps": 1e-2,
    },
    "qwen3-windows-bias": {
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 3},
    "llama3-bias": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 512,
        "rope_parameters": LLAMA3,
    },
    "llama-linear": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mlp_bias": True,
        "rope_theta": 300.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "sliding_window": 5,
    },
    "mistral-full": {
        "model_type": "mistral",
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "sliding_window": None,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model three times: in torch, as a folder, and ours."""

    name: str
    torch_model: PreTrainedModel
    folder: Path
    model: models.Decoder


def make_case(name: str, folder: Path) -> Case:
    fields = {**SHAPE, **CASES[name]}
    torch_model = make_torch_model(fields)
    torch_model.save_pretrained(folder)
    # transformers writes its newest spelling: put back what this case spells otherwise.
    path = folder / "config.json"
    written = json.loads(path.read_text())
    if "rope_theta" in fields:
        del written["rope_parameters"]
    path.write_text(json.dumps({**written, **fields}))
    return Case(name, torch_model, folder, models.load(folder))


def make_torch_model(fields: dict[str, Any]) -> PreTrainedModel:
    """A random model whose biases are not zero and whose norm scales are not one."""
    torch.manual_seed(len(json.dumps(fields)))
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.15)
            parameter.copy_(center + spread * torch.randn_like(parameter))
    return model


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)
