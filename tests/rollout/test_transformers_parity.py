"""Greedy completions equal those of transformers' ``generate`` on a padded batch."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrft.rollout import NativeEngine, Request, SamplingParams
from tests.models.configs import CASES
from tests.rollout.tiny import tokens_of

NEW_TOKENS = 24
EOS = 7


FAST = ("qwen3-windows-bias",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
)
def test_greedy_equals_generate(name, tmp_path) -> None:
    pytest.importorskip("torch")
    from tests.models.cases import make_case

    case = make_case(name, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, case.model.spec.vocab_size, length).tolist() for length in (1, 2, 5, 9, 16, 17)]
    expected = torch_generate(case.torch_model, prompts)
    with NativeEngine(case.model, max_slots=8, max_length=48, eos_token_ids=[EOS]) as engine:
        completions = engine.generate(
            [Request(prompt_ids=prompt) for prompt in prompts], SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
        )
    assert tokens_of(completions) == expected


def torch_generate(model, prompts: list[list[int]]) -> list[list[int]]:
    """Left-padded, as transformers wants it; what follows the end of a completion is cut off."""
    import torch

    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        rows = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=EOS, pad_token_id=0
        )
    completions = rows[:, longest:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in completions]
