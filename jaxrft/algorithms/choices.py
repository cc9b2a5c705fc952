"""Values that are refused: unknown names, with the nearest one that is known, and numbers out of range."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require_choice(field: str, value: object, choices: Iterable[str]) -> None:
    """Checks that a field holds one of the names it takes.

    Raises:
        ValueError: it does not; the message gives the field, what it got, what it takes and the nearest name.
    """
    names = list(choices)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    takes = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    raise ValueError(f"{field}: got {value!r}, takes {takes}{hint}")


def require_range(field: str, value: float | None, least: float, most: float = float("inf")) -> None:
    """Checks that a number is within its range, ends included; None is no number and passes.

    Raises:
        ValueError: it is not, or is NaN; the message gives the field, what it got and what it takes.
    """
    if value is None or least <= value <= most:
        return
    limits = f"at least {least}" if most == float("inf") else f"{least} to {most}"
    raise ValueError(f"{field}: got {value!r}, takes {limits}")
