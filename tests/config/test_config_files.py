"""Every config that the project ships can be read."""

from pathlib import Path

import pytest

from jaxrft.config.parse import parse

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.y*ml"))


def test_there_are_some():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_parses(path):
    config = parse([str(path)])
    assert config.model.path or config.model.scratch
    assert config.data.train
    assert config.rewards.functions
