"""What every config class shares: documented fields and the checks on their values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxrft.config.values import REFUSED, convert, describe, in_range, show

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
        try:
            for field in dataclasses.fields(self):
                value = check_value(field.name, getattr(self, field.name), hints[field.name], field.metadata)
                object.__setattr__(self, field.name, value)
            self.check()
        except ConfigError as error:
            # Several classes have a field of the same name: learning_rate, temperature, eval_steps.
            raise ConfigError(f"{type(self).__name__}.{error}") from None

    def check(self) -> None:
        """Refuses combinations of fields that cannot work together. Overridden where there are any."""


def is_section(hint: Any) -> bool:
    """Whether a type hint is a nested config class."""
    return isinstance(hint, type) and issubclass(hint, Section)


def check_value(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """Returns ``value`` as type ``hint``, or raises :class:`ConfigError`.

    Integers pass where floats are wanted, so does text that spells a number, and one value passes
    where a list is wanted. Values of type ``Any`` must be plain (numbers, text, lists, mappings),
    so that a config can always be written to a file.

    Args:
        name: the field, for the error's message.
        value: what was given.
        hint: the field's resolved type.
        limits: the bounds that :func:`option` took, by their names there; of a list, for each item.
    """
    converted = convert(value, hint)
    if converted is REFUSED or not in_range(converted, limits):
        raise ConfigError(f"{name}: got {show(value)}, takes {describe(hint, limits)}")
    return converted
