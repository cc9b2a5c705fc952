"""What benchmarks/grpo_step.py measures: shapes, prompts and the reward. The standard library alone: every side has it.

Tokens are words, t0, t1, ..., so that every model of any vocabulary has a tokenizer, and no completion ends early:
there is no end-of-sequence token that a model could draw.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

# Rollouts that the prompts last for, before they come again.
ROLLOUTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One GRPO step: prompts x group completions of new_tokens tokens, and one optimizer step on them.

    Attributes:
        name: of the case.
        model: fields of a Qwen2's config.json.
        prompts: of a rollout.
        group: completions of each.
        prompt_length, new_tokens: tokens.
        micro_batch: samples that are trained on at once.
        dtype: of the computation; parameters are float32.
    """

    name: str
    model: dict[str, Any]
    prompts: int
    group: int
    prompt_length: int
    new_tokens: int
    micro_batch: int
    dtype: str

    @property
    def samples(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.group

    @property
    def vocabulary(self) -> int:
        """Tokens of the model's vocabulary."""
        return self.model["vocab_size"]


def qwen2(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Fields of a config.json."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


_CASES = (
    # Seconds in a test.
    Case(
        name="tiny", model=qwen2(32, 16, 32, 1, 2, 1), prompts=2, group=2, prompt_length=3, new_tokens=4,
        micro_batch=4, dtype="float32",
    ),
    Case(
        name="hidden256", model=qwen2(128, 256, 512, 4, 4, 2), prompts=8, group=8, prompt_length=16, new_tokens=64,
        micro_batch=64, dtype="float32",
    ),
    Case(
        name="quarter", model=qwen2(128, 64, 128, 4, 4, 2), prompts=4, group=4, prompt_length=16, new_tokens=32,
        micro_batch=16, dtype="float32",
    ),
    # Qwen2.5's shape. In larger micro-batches TRL's logits alone would fill a GPU.
    Case(
        name="0.5B", model=qwen2(151936, 896, 4864, 24, 14, 2), prompts=32, group=8, prompt_length=64, new_tokens=512,
        micro_batch=16, dtype="bfloat16",
    ),
)  # fmt: skip
CASES = {case.name: case for case in _CASES}


def read(fields: dict[str, Any]) -> Case:
    """A case as it was sent."""
    return Case(**fields)


def make_prompts(case: Case, seed: int = 0) -> list[str]:
    """Texts of ``prompt_length`` random words each."""
    draw = random.Random(seed)
    words = [[f"t{draw.randrange(case.vocabulary)}" for _ in range(case.prompt_length)] for _ in range(rows(case))]
    return [" ".join(row) for row in words]


def rows(case: Case) -> int:
    """Prompts of the data set."""
    return ROLLOUTS * case.prompts


def make_reward(case: Case) -> Any:
    """The share of even tokens, for any trainer; refuses a completion that is not of full length."""

    def even_tokens(completions: list[str], **_: Any) -> list[float]:
        found = []
        for words in map(str.split, completions):
            if len(words) != case.new_tokens:
                raise ValueError(f"a completion has {len(words)} tokens, not {case.new_tokens}")
            found.append(sum(word[-1] in "02468" for word in words) / len(words))
        return found

    return even_tokens
