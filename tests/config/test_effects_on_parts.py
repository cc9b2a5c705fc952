"""What the fields of data, rewards, engine and model change in the parts that are made from them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import models
from jaxrft.config import ConfigError, RLConfig
from jaxrft.config.parse import from_dict
from jaxrft.data.records import Prompt
from jaxrft.data.tokenizers import load_tokenizer
from jaxrft.rollout.vllm import launch
from jaxrft.training import parts
from tests.training.tiny import MODEL, SCRATCH


def prompts_of(name="train", **data):
    config = from_dict({"max_prompt_length": 6, "data": data})
    return parts.build_prompts(config, None, load_tokenizer(MODEL.tokenizer, config.data.chat_template), name)


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n), "unit": "apples"} for n in (1, 2, 333)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_prompts(tmp_path, rows_file, name):
    """``train``, ``eval``, ``columns``, ``overlong_prompts``, ``max_train_samples`` and ``max_eval_samples``."""
    columns = {"prompt": "question"}
    made = prompts_of(name, **{name: rows_file}, columns=columns)
    assert [prompt.value for prompt in made.prompts] == ["1+1=", "2+2="]
    assert made.prompts[0].columns == {"answer": "2", "unit": "apples"}
    assert made.dropped == 1
    with pytest.raises(ConfigError, match="row 2: the prompt has 8 tokens"):
        prompts_of(name, **{name: rows_file}, columns=columns, overlong_prompts="error")
    limit = {"train": "max_train_samples", "eval": "max_eval_samples"}[name]
    assert len(prompts_of(name, **{name: rows_file}, columns=columns, **{limit: 1}).prompts) == 1
    with pytest.raises(ConfigError, match="prompt"):
        prompts_of(name, **{name: rows_file})


def test_prompts_of_a_split(tmp_path):
    """``train_split`` and ``eval_split`` choose a file of a folder."""
    for split, number in (("train", 1), ("test", 2), ("other", 3)):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": f"{number}="}) + "\n")
    folder = str(tmp_path)
    assert prompts_of("train", train=folder).prompts[0].value == "1="
    assert prompts_of("eval", eval=folder).prompts[0].value == "2="
    assert prompts_of("train", train=folder, train_split="other").prompts[0].value == "3="
    assert prompts_of("eval", eval=folder, eval_split="other").prompts[0].value == "3="


def test_prompts_of_a_function(tmp_path):
    """``arguments`` go to the function; ``system_prompt`` and ``chat_template`` make the text."""
    (tmp_path / "rows.py").write_text("def rows(top):\n    return [{'prompt': f'{n}='} for n in range(top)]\n")
    source = f"{tmp_path}/rows.py:rows"
    assert len(prompts_of(train=source, arguments={"top": 5}).prompts) == 5
    template = "{% for m in messages %}{{ m['content'] }}+{% endfor %}"
    made = prompts_of(train=source, arguments={"top": 1}, system_prompt="9", chat_template=template)
    assert made.prompts[0].text == "9+0=+"


def test_rewards(tmp_path, monkeypatch):
    """``functions`` and their ``arguments``, ``reward_weights`` and ``timeout``."""
    (tmp_path / "own.py").write_text("def score(completions, by=1):\n    return [by * len(c) for c in completions]\n")
    own = f"{tmp_path}/own.py:score"
    settings = {"functions": ["exact_match", own], "arguments": {own: {"by": 10}}, "timeout": 2.5}
    rewards = parts.build_rewards(from_dict({"rewards": settings, "reward_weights": [1, 0.5]}), None)
    scores = rewards.score([Prompt(0, "1+1=", "1+1=", [0], {"answer": "2"})], ["2"], [[2]])
    assert scores.total.tolist() == [1 + 0.5 * 10]
    given = []
    monkeypatch.setattr(parts.rewards, "load_rewards", lambda *arguments: given.append(arguments) or [len])
    parts.build_rewards(from_dict({"rewards": {"functions": ["math"], "timeout": 2.5}}), None)
    assert given == [(["math"], {}, 2.5)]


def test_engine(monkeypatch, tmp_path):
    """``engine``, ``max_slots``, ``decode_chunk``, ``quantization``; what vllm's servers get has its own tests."""
    made = {}
    monkeypatch.setattr(parts, "NativeEngine", lambda *_, **options: made.update(options))
    settings = {"max_slots": 3, "decode_chunk": 2, "quantization": "fp8"}
    config = RLConfig(rollout=from_dict({"rollout": settings}).rollout, max_prompt_length=5)
    parts.build_engine(config, None, None, tmp_path)
    assert made == settings | {"max_length": 5 + config.max_completion_length, "max_prompt_length": 5}
    monkeypatch.setattr(
        launch, "engine_from", lambda config, model, tokenizer, logs, say: (config.rollout.engine, logs)
    )
    config = from_dict({"rollout": {"engine": "vllm"}})
    assert parts.build_engine(config, None, None, tmp_path) == ("vllm", tmp_path / "logs")


def test_model(tmp_path):
    """``scratch``, ``tokenizer``, ``dtype``, ``seed`` and ``path``: a model made, saved, and loaded again."""
    lengths = {"max_prompt_length": 16, "max_completion_length": 16}
    config = RLConfig(model=dataclasses.replace(MODEL, dtype="bfloat16"), **lengths)
    tokenizer = parts.build_tokenizer(config, None, None)
    assert tokenizer.encode("0+", add_special_tokens=False) != tokenizer.encode("1+", add_special_tokens=False)
    made = parts.build_model(config, None, tokenizer, None)
    assert (made.dtype, made.spec.hidden_size) == (jnp.bfloat16, SCRATCH["hidden_size"])
    assert made.spec.vocab_size == len(tokenizer)
    models.save(made, tmp_path / "model", tokenizer=tokenizer)
    loaded = parts.build_model(
        from_dict({"model": {"path": str(tmp_path / "model")}, **lengths}), None, tokenizer, None
    )
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded.output_kernel, made.output_kernel)
    other = parts.build_model(RLConfig(model=MODEL, seed=7, **lengths), None, tokenizer, None)
    assert not np.array_equal(other.output_kernel, made.output_kernel)
