"""``--help`` and the configuration reference, both made from the config classes.

``python -m jaxrft.config.help`` prints the reference page.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from jaxrft.config.base import MISSING, Section, is_section
from jaxrft.config.rl import RLConfig
from jaxrft.config.values import describe
from jaxrft.config.yaml_text import dump

USAGE = """\
usage: python -m jaxrft.train CONFIG.yaml [key=value ...]
       python -m jaxrft.train CONFIG.yaml [key=value ...] --print-config
       python -m jaxrft.train --help | --version
"""
EXAMPLES = """\
Fine-tunes a language model by reinforcement learning.

CONFIG.yaml sets fields, key=value changes them. A key is a field's full path, a value is YAML:
  python -m jaxrft.train configs/quickstart.yaml
  python -m jaxrft.train configs/quickstart.yaml learning_rate=1e-4 rollout.max_slots=32
  python -m jaxrft.train configs/jsonl.yaml data.train=my.jsonl data.columns.prompt=question
  python -m jaxrft.train configs/jsonl.yaml 'rewards.functions=[exact_match, my.py:score]'
  python -m jaxrft.train runs/first/config.yaml output_dir=runs/second eval_steps=null

--print-config shows the config that comes of it, every field spelled out, and runs nothing.

Below, each field as field = default, what it takes, what it means. null is None in Python.
"""
# The fields at the top level, in groups: first field -> the group's title.
GROUPS = {
    "task": "Run",
    "learning_rate": "Optimizer",
    "num_train_epochs": "Steps and batches",
    "num_generations": "Generation",
    "beta": "Loss",
    "eval_on_start": "Evaluation, logs and checkpoints",
}
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field: its full path, what it takes, its default as YAML, its meaning."""

    path: str
    takes: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Fields that stand together, with a title and a sentence about them."""

    title: str
    about: str
    entries: list[Entry]


def groups() -> Iterator[Group]:
    """All fields of a config: those of the top level by subject, then one group a section."""
    top = [field for field in dataclasses.fields(RLConfig) if not is_section(_hints(RLConfig)[field.name])]
    starts = [*(index for index, field in enumerate(top) if field.name in GROUPS), len(top)]
    for start, end in itertools.pairwise(starts):
        yield Group(GROUPS[top[start].name], "", [_entry(RLConfig, field, "") for field in top[start:end]])
    yield from _sections(RLConfig, "")


def _sections(section: type[Section], path: str) -> Iterator[Group]:
    """The sections within one, each followed by those within it."""
    for name, hint in _hints(section).items():
        if is_section(hint):
            plain = [field for field in dataclasses.fields(hint) if not is_section(_hints(hint)[field.name])]
            entries = [_entry(hint, field, f"{path}{name}.") for field in plain]
            yield Group(f"{path}{name}", inspect.cleandoc(hint.__doc__ or ""), entries)
            yield from _sections(hint, f"{path}{name}.")


def help_text() -> str:
    """What ``python -m jaxrft.train --help`` prints, at most 100 columns wide."""
    parts = [USAGE, EXAMPLES]
    for group in groups():
        lines = _wrap(f"{group.title}: {group.about}" if group.about else group.title, "", "  ")
        for entry in group.entries:
            assignment = f"  {entry.path} = {entry.default}"
            lines += _wrap(entry.takes, f"{assignment:<48}  ", " " * 50)
            lines += _wrap(entry.meaning, " " * 6, " " * 6)
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def reference_markdown() -> str:
    """The page ``docs/configuration.md``."""
    parts = [_INTRODUCTION]
    for group in groups():
        nested = "." in group.entries[0].path
        parts.append(f"## {f'`{group.title}`' if nested else group.title}\n")
        if group.about:
            parts.append(f"{group.about}\n")
        rows = ["| Field | Takes | Default | Meaning |", "| --- | --- | --- | --- |"]
        for entry in group.entries:
            cells = (f"`{entry.path}`", entry.takes, f"`{entry.default}`", entry.meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


_INTRODUCTION = """\
# Configuration

A run is described by a YAML file, and by overrides on the command line:

```bash
python -m jaxrft.train configs/quickstart.yaml learning_rate=1e-4 rollout.max_slots=32
```

A key is a field's full path; a value is YAML, so that lists (`'rewards.functions=[exact_match]'`), `null`, and
whole mappings (`'model.scratch={model_type: qwen2, hidden_size: 64}'`) can be given. One entry of a mapping is set
by its name (`rewards.arguments.length.target=100`). `--print-config` shows the result without running it, and every
run writes it to `config.yaml` in its folder, from which it can be repeated.

A file can build on another: `base: quickstart.yaml` at its top takes every field of that file, looked for beside it,
and the fields that stand below change it, entry by entry in sections and mappings.

A key that does not exist is refused with the nearest one that does, a value that a field does not take with what it
takes, and values that cannot go together before anything is loaded.

In Python the same fields are those of `jaxrft.RLConfig`, and of one class a section:

```python
from jaxrft.config import RLConfig, RolloutConfig

config = RLConfig(learning_rate=1e-4, rollout=RolloutConfig(max_slots=32))
```

Fields at the top level mean what they mean in TRL's `GRPOConfig`. Text needs quotes where it looks like a number,
`true`, `false` or `null`; `1e-5` is a number, `yes` and `no` are text. `null` is Python's `None`.

This page is made from the config classes: `python -m jaxrft.config.help > docs/configuration.md`.
"""


def _hints(section: type[Section]) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _entry(section: type[Section], field: dataclasses.Field[Any], path: str) -> Entry:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    takes = describe(_hints(section)[field.name], field.metadata)
    return Entry(f"{path}{field.name}", takes, _spell(default), field.metadata["help"])


def _spell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    return dump({"": value}).partition(":")[2].strip()


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


if __name__ == "__main__":
    print(reference_markdown(), end="")
