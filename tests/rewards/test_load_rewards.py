"""Rewards by name, their arguments, and their errors."""

import pytest

from jaxrft.config import ConfigError
from jaxrft.data import Prompt
from jaxrft.rewards import RewardSet, load_rewards


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def bonus(completions, level, bonus=1.0):\n    return [bonus + x for x in level]\n\n"
        "async def later(completions, **options):\n    return [options['by'] for _ in completions]\n"
    )
    return path


def run(rewards, **columns):
    prompts = [Prompt(index=0, value="p", text="p", token_ids=[0], columns=columns)]
    return {k: v.tolist() for k, v in rewards.score(prompts, ["46"], [[1, 2]]).components.items()}


def test_rules_and_functions_with_arguments(mine):
    functions = [
        "exact_match",
        "length",
        f"{mine}:bonus",
        f"{mine}:later",
        f"{mine}:bonus",
        "jaxrft.rewards.rules:boxed",
    ]
    arguments = {"length": {"target": 4}, "bonus": {"bonus": 3.0}, f"{mine}:later": {"by": 5}}
    loaded = load_rewards(functions, arguments, 1.0)
    assert [f.__name__ for f in loaded] == ["exact_match", "length", "bonus", "later", "bonus", "boxed"]
    rewards = RewardSet(loaded[:-1])
    # A column named like an option or like an argument from the config does not take its place.
    assert run(rewards, answer="46", level=1.0, bonus=100.0, by=7, target=1, strip=False) == {
        "exact_match": [1.0],
        "length": [0.5],
        "bonus": [4.0],
        "later": [5.0],
        "bonus_2": [4.0],
    }
    rewards.close()


@pytest.mark.parametrize(
    ("functions", "arguments", "message"),
    [
        (["exact_mach"], {}, r"rewards\.functions: got 'exact_mach', takes .*math.*; did you mean exact_match\?"),
        (["maths"], {}, r"did you mean math\?"),
        (["nowhere.py:f"], {}, r"rewards\.functions: no file /.*nowhere\.py"),
        (["no_such_package.sub:f"], {}, "no module 'no_such_package'"),
        (["jaxrft.rewards.rules:bxed"], {}, r"has no function 'bxed'; did you mean boxed"),
        (["length"], {"lenght": {"target": 1}}, r"arguments: got 'lenght', takes .*\(length\); did you mean length\?"),
        (["length"], {"math": {}}, r"rewards\.arguments: got 'math', takes a name from rewards\.functions"),
        (["length"], {"length": {"tarket": 1}}, r"arguments\.length: got 'tarket', takes target, maximum, buffer; did"),
        (["math"], {"math": {"worker": 1}}, r"arguments\.math: got 'worker', takes timeout, workers, memory; did"),
        (["math"], {"math": {"workers": 0}}, r"arguments\.math\.workers: got 0, takes a whole number above 0"),
        (["math"], {"math": {"workers": 1.5}}, r"arguments\.math\.workers: got 1\.5, takes a whole"),
        (["math"], {"math": {"memory": "2GB"}}, r"arguments\.math\.memory: got '2GB', takes a number above 0"),
        (["format_boxed"], {"format_boxed": {"tags": []}}, "got 'tags', takes single"),
    ],
)
def test_mistakes_are_one_line(functions, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_rewards(functions, arguments, 1.0)
    assert "\n" not in str(caught.value)


def test_an_argument_that_a_function_does_not_take(mine):
    with pytest.raises(
        ConfigError, match=r"arguments\.bonus: got 'bonis', takes completions, level, bonus; did you mean bonus\?"
    ):
        load_rewards([f"{mine}:bonus"], {"bonus": {"bonis": 1}}, 1.0)


def test_math_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="math needs the package math-verify: pip install math-verify"):
        load_rewards(["math"], {}, 1.0)
