"""What every config class shares: documented fields and the checks on their values."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union

MISSING = dataclasses.MISSING


class ConfigError(ValueError):
    """A config that cannot be run. The message names the field, what it got and what it takes."""


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    factory: Any = None,
) -> Any:
    """A documented dataclass field.

    Args:
        default: the value when nothing is given; use ``factory`` for a mutable one.
        help: one or two sentences for ``--help`` and the configuration reference.
        minimum, above: inclusive and exclusive lower bound of a number.
        maximum, below: inclusive and exclusive upper bound of a number.
        factory: makes the default of a list, mapping or nested section.
    """
    metadata = {"help": help, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all config classes: frozen, keyword-only, checked when built."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = check_type(field.name, getattr(self, field.name), hints[field.name])
            check_range(field.name, value, field.metadata)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Refuses combinations of fields that cannot work together. Overridden where there are any."""


def is_section(hint: Any) -> bool:
    """Whether a type hint is a nested config class."""
    return isinstance(hint, type) and issubclass(hint, Section)


def check_type(name: str, value: Any, hint: Any) -> Any:
    """Returns ``value`` as type ``hint``, or raises :class:`ConfigError`.

    Integers pass where floats are wanted, and strings such as ``1e-5`` do too, since YAML
    reads that spelling as text.
    """
    converted = _convert(value, hint)
    if converted is _REFUSED:
        raise ConfigError(f"{name}: got {value!r}, takes {describe_type(hint)}")
    return converted


_REFUSED = object()


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        results = [_convert(value, argument) for argument in arguments]
        # An exact type wins over a conversion: True is a bool before it is anything else.
        exact = [r for r, a in zip(results, arguments) if r is not _REFUSED and type(r) is type(value)]
        return next(iter(exact), next((r for r in results if r is not _REFUSED), _REFUSED))
    if origin is Literal:
        return next((a for a in arguments if a == value and type(a) is type(value)), _REFUSED)
    if origin is list:
        if not isinstance(value, list | tuple):
            return _REFUSED
        items = [_convert(item, arguments[0]) for item in value]
        return _REFUSED if any(item is _REFUSED for item in items) else items
    if origin is dict:
        if not isinstance(value, dict):
            return _REFUSED
        items = {k: _convert(v, arguments[1]) for k, v in value.items()}
        bad = any(v is _REFUSED for v in items.values()) or not all(isinstance(k, str) for k in items)
        return _REFUSED if bad else items
    return _convert_scalar(value, hint)


def _convert_scalar(value: Any, hint: Any) -> Any:
    if hint is float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return _REFUSED
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _REFUSED
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _REFUSED
    if hint is type(None):
        return None if value is None else _REFUSED
    return value if isinstance(value, hint) else _REFUSED


def check_range(name: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    """Raises :class:`ConfigError` when a number lies outside the bounds of its field."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    holds = {
        "minimum": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "maximum": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    bounds = {kind: limits.get(kind) for kind in holds if limits.get(kind) is not None}
    if math.isnan(value) or not all(holds[kind](bound) for kind, bound in bounds.items()):
        raise ConfigError(f"{name}: got {value!r}, takes {describe_range(limits)}")


def describe_range(limits: typing.Mapping[str, Any]) -> str:
    """The bounds of a field in words, empty when it has none."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    parts = [f"{word} {limits[kind]:g}" for kind, word in words.items() if limits.get(kind) is not None]
    return f"a number {' and '.join(parts)}" if parts else "a number"


def describe_type(hint: Any) -> str:
    """A type hint as a person would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list of {describe_type(arguments[0])}"
    if origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
