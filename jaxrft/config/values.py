"""Values of fields: what a type takes, within which bounds, and how to say so."""

from __future__ import annotations

import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

REFUSED = object()


def convert(value: Any, hint: Any) -> Any:
    """``value`` as type ``hint``, or ``REFUSED``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _convert_plain(value)
    if origin in (Union, types.UnionType):
        results = (convert(value, argument) for argument in arguments)
        return next((result for result in results if result is not REFUSED), REFUSED)
    if origin is Literal:
        return next((a for a in arguments if a == value and type(a) is type(value)), REFUSED)
    if origin is list:
        if value is None or isinstance(value, dict):
            return REFUSED
        value = value if isinstance(value, list | tuple) else [value]
        items = [convert(item, arguments[0]) for item in value]
        return REFUSED if any(item is REFUSED for item in items) else items
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return REFUSED
        values = {key: convert(item, arguments[1]) for key, item in value.items()}
        return REFUSED if any(item is REFUSED for item in values.values()) else values
    return _convert_scalar(value, hint)


def _convert_plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        keys = all(isinstance(key, str | int) for key in value)
        values = {key: _convert_plain(item) for key, item in value.items()}
        return values if keys and not any(item is REFUSED for item in values.values()) else REFUSED
    return convert(value, list[Any]) if isinstance(value, list | tuple) else REFUSED


def _convert_scalar(value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return REFUSED
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 is a float to YAML.
    if isinstance(value, bool) and hint is not bool:
        return REFUSED
    if not isinstance(value, int | float if hint is float else hint):
        return REFUSED
    return hint(value) if hint in (int, float, str) else value


def in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    """Whether a number, or every number of a list, is finite and within the bounds; anything else is."""
    if isinstance(value, list):
        return all(in_range(item, limits) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    holds = {"minimum": operator.ge, "above": operator.gt, "maximum": operator.le, "below": operator.lt}
    return math.isfinite(value) and all(
        compare(value, limits[kind]) for kind, compare in holds.items() if limits.get(kind) is not None
    )


def describe(hint: Any, limits: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """What a field takes, as a person would say it: ``an integer of at least 1, or null``."""
    *first, last = _alternatives(hint, limits)
    comma = "," if any(" " in text for text in first) else ""
    return f"{', '.join(first)}{comma} or {last}" if first else last


def _alternatives(hint: Any, limits: Mapping[str, Any]) -> list[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return [text for argument in arguments for text in _alternatives(argument, limits)]
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin is list:
        return [f"a list of {_PLURALS.get(arguments[0]) or describe(arguments[0], limits)}"]
    if origin is dict:
        return [f"a mapping of names to {_PLURALS.get(arguments[1], 'mappings')}"]
    if hint in (int, float):
        return [_NAMES[hint] + _bounds(limits)]
    return [_NAMES.get(hint) or f"a {hint.__name__}"]


_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_PLURALS = {int: "integers", float: "numbers", str: "texts", Any: "plain values"}


def _bounds(limits: Mapping[str, Any]) -> str:
    words = {"minimum": "of at least", "above": "above", "maximum": "at most", "below": "below"}
    given = {kind: limits[kind] for kind in words if limits.get(kind) is not None}
    if given.keys() == {"minimum", "maximum"}:
        return f" from {given['minimum']} to {given['maximum']}"
    parts = [f"{words[kind]} {bound}" for kind, bound in given.items()]
    return " " + " and ".join(parts) if parts else ""


def show(value: Any) -> str:
    """A value as a config file spells it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
