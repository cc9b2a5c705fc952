"""Configs of tiny models of every family, in Hugging Face's words."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)
