"""Lines of cells under their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their columns; one that is shorter, as of a case that failed, has no say in the widths."""
    lines = [list(columns), *map(list, rows)]
    full = [line for line in lines if len(line) == len(columns)]
    widths = [max(len(line[i]) for line in full) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
