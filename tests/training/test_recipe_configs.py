"""Each recipe has a config, which changes nothing of it and says what it sets."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from jaxrft import algorithms as alg
from jaxrft.config import ConfigError
from jaxrft.config.parse import parse
from jaxrft.training.parts import build_recipe

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "algorithms"


def test_every_recipe_has_a_config():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == alg.recipes()


@pytest.mark.parametrize("name", alg.recipes())
def test_a_recipes_config(name):
    path = FOLDER / f"{name}.yaml"
    config = parse([str(path)])
    recipe = alg.recipe(name).with_overrides({"constant_length": config.max_completion_length})
    assert config.algorithm.recipe == name
    if name == "ppo":
        with pytest.raises(ConfigError, match=r"^algorithm\.recipe: ppo needs a critic"):
            build_recipe(config)
    else:
        assert build_recipe(config) == recipe
    lines = re.findall(r"^  (?:# )?(\w+: .*)$", path.read_text(), re.MULTILINE)
    said = yaml.safe_load("\n".join(line for line in lines if not line.startswith("recipe:") and "null" not in line))
    values = {
        field.name: getattr(part, field.name)
        for part in (getattr(recipe, p.name) for p in dataclasses.fields(recipe))
        for field in dataclasses.fields(part)
    }
    values["clip_high"] = recipe.policy.upper
    assert said == {field: values[field] for field in said}
    plain = dataclasses.asdict(alg.Recipe())
    defaults = {field: value for part in plain.values() for field, value in part.items()}
    differs = {f for f, value in values.items() if value != defaults[f] and f not in ("clip_high", "constant_length")}
    assert differs <= set(said), "what is not as it is by default is spelled out"
