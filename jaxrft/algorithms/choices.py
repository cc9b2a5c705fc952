"""Names that stand for something: refused when unknown, with the nearest one that is known."""

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
