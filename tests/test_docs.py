"""What the README and the pages show works: links, configs, the ten lines, the data of the second config."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from jaxrft.config.parse import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_links_of_the_readme():
    """mkdocs looks after those of the pages."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 10
    headings = {"#" + re.sub(r"\W+", "-", line.lower()) for line in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    assert [link for link in links if not (ROOT / link).exists() and link not in headings] == []


@pytest.mark.parametrize("text", [README, page("quickstart")], ids=["README", "quickstart"])
def test_configs(text, tmp_path):
    (shown,) = blocks(text, "yaml")
    (tmp_path / "my.yaml").write_text(shown)
    config = parse([str(tmp_path / "my.yaml")])
    assert (config.rollout_prompts, config.rollout_samples, config.updates_per_rollout) == (8, 64, 1)
    row = json.loads(blocks(text, "json")[0])
    assert set(config.data.columns.values()) == set(row)
    larger = dataclasses.replace(config, generation_batch_size=256)
    assert larger.updates_per_rollout == 4


def test_the_second_config_is_the_first_on_other_data():
    first, second = (parse([str(ROOT / "configs" / f"{name}.yaml")]) for name in ("quickstart", "jsonl"))
    assert dataclasses.replace(second, output_dir=first.output_dir, data=first.data) == first


def test_sums_are_held_out_by_value(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_sums.py", str(tmp_path / "sums"), "--largest", "30", "--held-out", "0.2"])
    runpy.run_path(str(ROOT / "scripts" / "make_sums.py"), run_name="__main__")
    seen, count = {}, 0
    for name in ("train", "test"):
        for line in (tmp_path / "sums" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", row["question"]).groups())
            assert row["solution"] == str(a + b)
            assert seen.setdefault(frozenset((a, b)), name) == name
            count += 1
    assert count == 31 * 31
    assert list(seen.values()).count("test") == round(0.2 * 31 * 32 / 2)


@pytest.mark.soak
def test_the_python_page(tmp_path, monkeypatch, capsys):
    """Its blocks one after the other, but for the one whose model would have to be fetched."""
    code = blocks(page("python-api"), "python")
    assert code[0] == next(block for block in blocks(README, "python") if "RLTrainer" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scope: dict = {}
    for block in code:
        if "Qwen/" not in block:
            exec(block, scope)
    assert "\n1.0\n" in capsys.readouterr().out
    gap = scope["logprobs"][0, len(scope["prompt"]) - 1 :] - scope["completions"][0].logprobs
    assert abs(gap).max() < 1e-4
    assert len(scope["rewards"]) == 30
