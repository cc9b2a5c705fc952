"""Every config that the project ships can be read; those of the algorithms are their recipes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from jaxrft import algorithms as alg
from jaxrft.config import ConfigError
from jaxrft.config.parse import parse
from jaxrft.training.parts import build_recipe

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.y*ml"))


def test_there_are_some():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}
    assert sorted(path.stem for path in FOLDER.glob("algorithms/*.yaml")) == alg.recipes()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_parses(path):
    config = parse([str(path)])
    assert config.model.path or config.model.scratch
    assert config.data.train
    assert config.rewards.functions


@pytest.mark.parametrize("name", alg.recipes())
def test_the_config_of_a_recipe(name):
    """Nothing of the recipe is changed, and what its comments say of it is so."""
    path = FOLDER / "algorithms" / f"{name}.yaml"
    config = parse([str(path)])
    assert config.algorithm.recipe == name
    recipe = alg.recipe(name).with_overrides({"constant_length": config.max_completion_length})
    if recipe.advantage.estimator == "gae":
        with pytest.raises(ConfigError, match="needs a critic"):
            build_recipe(config)
    else:
        assert build_recipe(config) == recipe
    parts = [getattr(recipe, part.name) for part in dataclasses.fields(recipe)]
    values = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    values["clip_high"] = recipe.policy.upper
    said = yaml.safe_load("\n".join(re.findall(r"^  # (\w+: [^ ]+)$", path.read_text(), re.MULTILINE)))
    assert said
    for field, value in said.items():
        assert values[field] == pytest.approx(value) if isinstance(value, float) else values[field] == value, field
