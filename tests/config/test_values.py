"""Types, bounds and messages of config fields."""

import dataclasses
import math
from typing import Any, Literal

import pytest

from jaxrft.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
    Section,
    WarmStartConfig,
)
from jaxrft.config.base import option
from jaxrft.config.values import REFUSED, convert, describe, show


@pytest.mark.parametrize(
    ("hint", "given", "kept"),
    [
        (int, 3, 3),
        (int, 1e4, 10000),
        (int, True, REFUSED),
        (int, 0.5, REFUSED),
        (int, "3", REFUSED),
        (float, 3, 3.0),
        (float, "1e-5", 1e-5),
        (float, "x", REFUSED),
        (float, False, REFUSED),
        (bool, True, True),
        (bool, 1, REFUSED),
        (bool, "true", REFUSED),
        (str, "x", "x"),
        (str, 3, REFUSED),
        (str, None, REFUSED),
        (str | None, None, None),
        (float | None, 3, 3.0),
        (int | None, True, REFUSED),
        (bool | int, True, True),
        (bool | int, 1, 1),
        (Literal["a", "b"], "b", "b"),
        (Literal["a", "b"], "c", REFUSED),
        (Literal[1, 2], True, REFUSED),
        (list[float], (1, "2e0"), [1.0, 2.0]),
        (list[float], 3, [3.0]),
        (list[str], "one", ["one"]),
        (list[str], None, REFUSED),
        (list[str], {"a": 1}, REFUSED),
        (list[int], [1, "x"], REFUSED),
        (list[Literal["a"]] | None, None, None),
        (dict[str, str], {"a": "b"}, {"a": "b"}),
        (dict[str, str], {"a": 1}, REFUSED),
        (dict[str, str], {1: "a"}, REFUSED),
        (dict[str, str], ["a"], REFUSED),
        (dict[str, dict[str, Any]], {"a": {"b": (1, None)}}, {"a": {"b": [1, None]}}),
        (dict[str, dict[str, Any]], {"a": 1}, REFUSED),
        (dict[str, Any], {"a": {0: [True, 1.5, "x"]}}, {"a": {0: [True, 1.5, "x"]}}),
        (dict[str, Any], {"a": object()}, REFUSED),
        (dict[str, Any], {"a": [len]}, REFUSED),
    ],
)
def test_convert(hint, given, kept):
    result = convert(given, hint)
    assert result is REFUSED if kept is REFUSED else (result == kept and type(result) is type(kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(Section):
    """One field for each kind of bound."""

    count: int = option(5, "", minimum=2, maximum=7)
    rate: float = option(0.5, "", above=0, below=1)
    maybe: float | None = option(None, "", minimum=0)
    many: list[float] = option(factory=list, help="", minimum=0)


@pytest.mark.parametrize(
    ("values", "takes"),
    [
        ({"count": 1}, "an integer from 2 to 7"),
        ({"count": 8}, "an integer from 2 to 7"),
        ({"rate": 0}, "a number above 0 and below 1"),
        ({"rate": 1}, "a number above 0 and below 1"),
        ({"rate": math.nan}, "a number above 0 and below 1"),
        ({"maybe": -1e-9}, "a number of at least 0, or null"),
        ({"maybe": math.inf}, "a number of at least 0, or null"),
        ({"many": [1, -1]}, "a list of numbers"),
        ({"many": [math.nan]}, "a list of numbers"),
    ],
)
def test_bounds(values, takes):
    (name,) = values
    with pytest.raises(ConfigError) as error:
        Bounded(**values)
    assert str(error.value) == f"Bounded.{name}: got {show(values[name])}, takes {takes}"


def test_bounds_themselves():
    assert Bounded(count=2).count == 2
    assert Bounded(count=7, maybe=0, many=[0]).maybe == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(max_slots=0), "RolloutConfig.max_slots: got 0, takes an integer of at least 1"),
        (
            lambda: RLConfig(seed=2**31),
            "RLConfig.seed: got 2147483648, takes an integer of at least 0 and below 2147483648",
        ),
        (lambda: RLConfig(loss_type="x"), "RLConfig.loss_type: got 'x', takes grpo, dapo, dr_grpo or null"),
        (lambda: RLConfig(eval_on_start=None), "RLConfig.eval_on_start: got null, takes true or false"),
        (lambda: RLConfig(rollout=None), "RLConfig.rollout: got null, takes a RolloutConfig"),
        (
            lambda: WarmStartConfig(learning_rate="high"),
            "WarmStartConfig.learning_rate: got 'high', takes a number above 0",
        ),
        (
            lambda: RewardsConfig(arguments={"length": 3}),
            "RewardsConfig.arguments: got {'length': 3}, takes a mapping of names to mappings",
        ),
        (
            lambda: DataConfig(columns={"prompt": None}),
            "DataConfig.columns: got {'prompt': null}, takes a mapping of names to texts",
        ),
        (lambda: ModelConfig(path="a", scratch={}), "ModelConfig.path: set with scratch; a model is either loaded"),
    ],
)
def test_messages_in_python(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).replace("None}", "null}").startswith(message)
    assert "\n" not in str(error.value)


def test_long_values_are_cut():
    assert len(show("x" * 1000)) == 80


def test_describe():
    assert describe(int | None, {"minimum": 1}) == "an integer of at least 1, or null"
    assert describe(Literal["a", "b"] | None) == "a, b or null"
    assert describe(str | None) == "text or null"
    assert describe(list[Literal["a", "b"]]) == "a list of a or b"


def test_impossible_combinations():
    """What cannot go together is refused when the config is made."""
    cases = {
        "steps_per_generation": dict(generation_batch_size=16, steps_per_generation=2),
        "num_generations": dict(num_generations=3),
        "epsilon": dict(epsilon=0.1, algorithm={"clip_low": 0.2}),
    }
    from jaxrft.config.parse import from_dict

    for name, values in cases.items():
        with pytest.raises(ConfigError, match=name):
            from_dict(values)
