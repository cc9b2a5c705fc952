"""The help and the configuration reference list every field."""

from pathlib import Path

import pytest

from jaxrft.config.help import GROUPS, groups, help_text, reference_markdown
from jaxrft.config.parse import known_keys, parse
from jaxrft.config.rl import RLConfig
from jaxrft.config.yaml_text import load_text

ROOT = Path(__file__).resolve().parents[2]


def leaves() -> list[str]:
    keys = known_keys()
    return [path for path in keys if not any(key.startswith(f"{path}.") for key in keys)]


def test_every_field_once_with_its_meaning():
    entries = [entry for group in groups() for entry in group.entries]
    assert [entry.path for entry in entries] == leaves()
    for entry in entries:
        assert len(entry.meaning) > 10, entry.path
        assert entry.meaning.endswith("."), entry.path
        assert entry.takes


def test_defaults_are_spelled_as_an_override_takes_them(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assignments = [f"{entry.path}={entry.default}" for group in groups() for entry in group.entries]
    assert parse([str(empty), *assignments]) == RLConfig()


def test_help_is_readable():
    text = help_text()
    for path in leaves():
        assert f"\n  {path} = " in text
    assert max(map(len, text.splitlines())) <= 100
    for title in GROUPS.values():
        assert f"\n{title}\n" in text
    assert text.startswith("usage: python -m jaxrft.train CONFIG.yaml")


def test_examples_in_the_help_parse():
    examples = [line.split("jaxrft.train ")[1] for line in help_text().splitlines() if line.startswith("  python -m")]
    assert len(examples) > 3
    for example in examples:
        for override in example.replace("'", "").split()[1:]:
            if "[" not in override and "=" in override:
                assert load_text(override.partition("=")[2], override) != ""
                assert override.partition("=")[0].split(".")[0] in known_keys()


def test_reference():
    page = reference_markdown()
    for path in leaves():
        assert f"| `{path}` |" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {5}


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an installed package has no docs")
def test_committed_reference_is_current():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == reference_markdown(), "run: python -m jaxrft.config.help > docs/configuration.md"
