"""Configs that build on another: ``base: other.yaml``."""

import pytest

from jaxrft.config import ConfigError
from jaxrft.config.parse import parse


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{next(iter(texts))}.yaml")]


def test_fields_are_laid_over_those_of_the_base(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", first="seed: 1\nbeta: 0.5\nmodel: {path: a, dtype: bfloat16}\nrollout: {stop: [x, y]}\n")
    files = write(
        tmp_path,
        third="base: second.yaml\nseed: 3\nbeta: null\n",
        second="base: below/first.yaml\nseed: 2\nmax_steps: 7\nmodel: {path: b}\nrollout: {stop: [z]}\n",
    )
    config = parse([*files, "max_steps=9"])
    assert (config.seed, config.max_steps, config.beta) == (3, 9, None)
    assert (config.model.path, config.model.dtype, config.rollout.stop) == ("b", "bfloat16", ["z"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "base: b.yaml\n"}, r"base: .*a\.yaml names .*b\.yaml, which does not exist"),
        (
            {"a": "base: b.yaml\n", "b": "base: a.yaml\n"},
            r"base: .*b\.yaml names a\.yaml, which builds on .*b\.yaml itself",
        ),
        ({"a": "base: 3\n"}, "base: got 3 in .*takes the name of a config file"),
        ({"a": "base: b.yaml\n", "b": "learning_rat: 1\n"}, "learning_rat: no such field"),
        ({"a": "base: b.yaml\n", "b": "[1]\n"}, r"b\.yaml: holds a list"),
    ],
)
def test_wrong_bases_are_refused(tmp_path, texts, message):
    with pytest.raises(ConfigError, match=message):
        parse(write(tmp_path, **texts))
