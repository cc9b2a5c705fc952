"""From a YAML file and ``a.b=c`` overrides to a config, and back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrft.config.base import ConfigError, Section, is_section
from jaxrft.config.hints import nearest
from jaxrft.config.rl import RLConfig
from jaxrft.config.values import describe, show
from jaxrft.config.yaml_text import dump, load_file, load_text


def parse(arguments: Sequence[str]) -> RLConfig:
    """The config of a command line.

    Args:
        arguments: a YAML file, which may name another that it builds on (``base: other.yaml``, looked for beside it),
            then any number of ``key=value``. A key is a field's full path
            (``rollout.max_slots``), a section, or one entry of a mapping
            (``rewards.arguments.length.target``); a value is YAML. Later ones win.

    Raises:
        ConfigError: no such file, wrong YAML, an unknown key, a value out of range, or values that
            do not go together.
    """
    if not arguments:
        raise ConfigError("no config file given")
    data = load_yaml(arguments[0])
    for argument in arguments[1:]:
        _override(data, argument)
    return from_dict(data)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, unchecked, laid over that of the file it names as its ``base``."""
    return _load(Path(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(_missing(path) if not above else f"base: {above[-1]} names {path}, which does not exist")
    data = load_file(path)
    if data is not None and not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds {_kind(data)}, takes a mapping of fields to values, as in 'learning_rate: 1e-6'"
        )
    data = dict(data or {})
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"base: got {show(base)} in {path}, takes the name of a config file")
    chain = (*above, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"base: {path} names {base}, which builds on {path} itself")
    return _over(_load(path.parent / base, chain), data)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One mapping laid over another, mappings in it likewise."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def from_dict(data: dict[str, Any]) -> RLConfig:
    """A config from nested plain values, as a YAML file has them. Fields left out keep their defaults."""
    unknown = list(_unknown(RLConfig, data))
    if unknown:
        raise ConfigError("; ".join(_explain(path) for path in unknown))
    return _build(RLConfig, data, "")


def to_dict(config: Section) -> dict[str, Any]:
    """A config as nested plain values, every field spelled out."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {k: to_dict(v) if isinstance(v, Section) else copy.deepcopy(v) for k, v in values.items()}


def to_yaml(config: Section) -> str:
    """The same as YAML text, which :func:`parse` reads back as an equal config."""
    return dump(to_dict(config))


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two configs as nested plain values: ``path: old -> new``, sorted."""
    old, new = _flat(before), _flat(after)
    return [
        f"{path}: {old.get(path)} -> {new.get(path)}" for path in sorted(old | new) if old.get(path) != new.get(path)
    ]


def _flat(data: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _build(section: type[Section], data: dict[str, Any] | None, path: str) -> Any:
    hints = typing.get_type_hints(section)
    values = dict(data or {})
    for name, hint in hints.items():
        if name in values and is_section(hint):
            values[name] = _build(hint, values[name], f"{path}{name}.")
    try:
        return section(**values)
    except ConfigError as error:
        raise ConfigError(path + str(error).removeprefix(f"{section.__name__}.")) from None


def _unknown(section: type[Section], data: Any, path: str = "") -> typing.Iterator[str]:
    """Paths of the keys that do not exist; a section that is no mapping is refused at once."""
    hints = typing.get_type_hints(section)
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path[:-1] or 'config'}: got {show(data)}, takes a mapping of its fields ({_some(hints)})")
    for key, value in (data or {}).items():
        if key not in hints:
            yield f"{path}{key}"
        elif is_section(hints[key]):
            yield from _unknown(hints[key], value, f"{path}{key}.")


def _explain(path: str) -> str:
    """Why a key is refused, and which was meant."""
    near = nearest(path, known_keys())
    return f"{path}: no such field" + (f" (did you mean {_join(near)}?)" if near else " (--help lists all)")


def known_keys(section: type[Section] = RLConfig, path: str = "") -> list[str]:
    """Full paths of all fields, and of the sections that hold them."""
    keys = []
    for name, hint in typing.get_type_hints(section).items():
        keys.append(f"{path}{name}")
        if is_section(hint):
            keys += known_keys(hint, f"{path}{name}.")
    return keys


def _override(data: dict[str, Any], argument: str) -> None:
    key, equals, text = argument.partition("=")
    if not equals:
        hint = "; only one config file can be given" if Path(argument).suffix in (".yaml", ".yml") else ""
        raise ConfigError(f"{argument}: takes the form key=value, such as learning_rate=1e-6{hint}")
    if key.startswith("-"):
        raise ConfigError(f"{argument}: write it without dashes: {key.lstrip('-').replace('-', '_')}={text}")
    if not all(key.split(".")):
        raise ConfigError(f"{argument}: the field's name is not complete")
    value = load_text(text, argument)
    *parents, last = key.split(".")
    _check_override(key)
    for depth, name in enumerate(parents):
        child = data.get(name)
        if child is None:
            child = data[name] = {}
        elif not isinstance(child, dict):
            parent = ".".join(parents[: depth + 1])
            raise ConfigError(f"{key}: {parent} is {show(child)}, which has no fields")
        data = child
    data[last] = value


def _check_override(key: str) -> None:
    """Refuses an unknown key before the value of its parent is looked at."""
    section: type[Section] = RLConfig
    names = key.split(".")
    for depth, name in enumerate(names):
        hints = typing.get_type_hints(section)
        if name not in hints:
            raise ConfigError(_explain(key))
        if not is_section(hints[name]):
            _check_entry(key, ".".join(names[: depth + 1]), names[depth + 1 :], hints[name])
            return
        section = hints[name]


def _check_entry(key: str, field: str, entry: list[str], hint: Any) -> None:
    takes_mapping = any(typing.get_origin(kind) is dict for kind in (hint, *typing.get_args(hint)))
    if entry and not takes_mapping:
        raise ConfigError(f"{key}: no such field; {field} takes {describe(hint)}")


def _missing(path: Path) -> str:
    """Names the place that was looked at, and a file that may have been meant."""
    if path.is_dir():
        return f"{path}: is a folder; takes a YAML file"
    beside = [*path.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml")]
    stems = {file.stem: str(file) for file in reversed(beside)}
    near = difflib.get_close_matches(path.stem, stems, n=1)
    if "=" in str(path):
        return f"{path}: the first argument takes a config file; overrides follow it"
    return f"{path}: no such config file (looked for {path.absolute()})" + (
        f"; did you mean {stems[near[0]]}?" if near else ""
    )


def _join(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]


def _kind(data: Any) -> str:
    return "a list" if isinstance(data, list) else show(data)


def _some(names: typing.Iterable[str]) -> str:
    first = list(names)
    return ", ".join([*first[:4], "..."] if len(first) > 4 else first)
