"""The examples of docs/add-a-reward.md run, and its errors are the ones that are raised."""

import re
from pathlib import Path

import pytest

from jaxrft.config import ConfigError
from jaxrft.config.parse import parse
from jaxrft.data import Prompt
from jaxrft.rewards import RewardSet, load_rewards

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-reward.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COLUMNS = {"answer": "46", "language": "en"}
PROMPTS = [Prompt(index=0, value="12+34=", text="12+34=", token_ids=[1], columns=COLUMNS)] * 2


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def score(functions, arguments=None, weights=None):
    rewards = RewardSet(load_rewards(functions, arguments or {}, 1.0), weights)
    try:
        return rewards.score(PROMPTS, ["46", "please, forty-six"], [[1, 2], [3]])
    finally:
        rewards.close()


def python(name):
    """Writes the example that defines ``name``."""
    (code,) = [text for kind, text in BLOCKS if kind == "python" and f"def {name}(" in text]
    Path("my_rewards.py").write_text(code)


def config(name):
    """Reads the config that names ``name``."""
    (text,) = [text for kind, text in BLOCKS if kind == "yaml" and f"my_rewards.py:{name}" in text]
    Path("config.yaml").write_text(text)
    return parse(["config.yaml"])


def test_a_function_in_a_file():
    python("close_enough")
    run = config("close_enough")
    scores = score(run.rewards.functions, run.rewards.arguments, run.reward_weights)
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "exact_match": [1, 0],
        "close_enough": [1, 0],
    }
    assert scores.total.tolist() == pytest.approx([1.2, 0])


def test_arguments():
    python("short")
    run = config("short")
    assert score(run.rewards.functions, run.rewards.arguments).total.tolist() == [1, 1]
    assert score(run.rewards.functions, {"short": {"limit": 5}}).total.tolist() == [1, 0]


def test_none_and_columns():
    python("polite")
    assert score(["my_rewards.py:polite"]).total.tolist() == [0, 1]


def test_async():
    python("judged")
    assert score(["my_rewards.py:judged"]).total.tolist() == [0, 1]


def test_python():
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "RewardSet" in text]
    exec(code, {})


def test_errors():
    Path("my_rewards.py").write_text("def strict(completions):\n    return [int(text) for text in completions]\n")
    (function,) = load_rewards(["my_rewards.py:strict"], {}, 1.0)

    def returns(values):
        def strict(completions):
            return values

        return strict

    def needs(completions, solution): ...

    needs.__name__ = "strict"
    columns = {"answer": "46", "level": 1}
    prompts = [Prompt(index=i, value="p", text="p", token_ids=[1], columns=columns) for i in (2, 5, 9, 17)]
    found = []
    for reward in (function, returns([1, 2, 3]), returns([0, float("nan"), 0, 0]), needs):
        with pytest.raises(ConfigError) as caught:
            RewardSet([reward]).score(prompts, ["45", "46", "47", "forty-six"], [[1]] * 4)
        found.append(f"error: {caught.value}\n")
    (block,) = [text for kind, text in BLOCKS if kind == "text"]
    assert block == "".join(found)
