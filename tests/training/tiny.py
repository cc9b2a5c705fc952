"""A run small enough for a test: a model of a few thousand parameters on sums of one digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrft.config import DataConfig, ModelConfig, RewardsConfig, RLConfig, TrackingConfig

SCRATCH = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
MODEL = ModelConfig(scratch=SCRATCH, tokenizer="characters:0123456789+=")
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]


def tiny_config(folder: Path, **changes: Any) -> RLConfig:
    """Four steps, each on 2 prompts x 4 completions."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": 3,
        "model": MODEL,
        "data": DataConfig(),
        "rewards": RewardsConfig(),
        "tracking": TrackingConfig(progress=False),
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_prompt_length": 8,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": None,
    }
    return RLConfig(**settings | changes)


def digits(completions: list[str], **_: Any) -> list[float]:
    """Share of the longest completion that is digits: varied, so that advantages are not 0."""
    return [sum(c.isdigit() for c in text) / 4 for text in completions]
