"""The line that the console prints for a logged step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxrft.tracking.loggers import numbers


def fixed(digits: int) -> Callable[[float], str]:
    """Formats with this many decimals."""
    return lambda value: f"{value:.{digits}f}"


def compact(value: float) -> str:
    """About three digits: plain where that is short, else with an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 100 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 100 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.0f}%" if math.isfinite(value) else f"{value:g}"


def thousands(value: float) -> str:
    """A large number with k or M."""
    if not math.isfinite(value) or abs(value) < 1000:
        return f"{value:.0f}"
    return f"{value / 1e6:.1f}M" if abs(value) >= 1e6 else f"{value / 1e3:.1f}k"


def duration(seconds: float) -> str:
    """Seconds as 4:05, 1:04:05 or 2d 3:04:05."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One metric in the line.

    Attributes:
        metric: its full name.
        label: its short name.
        show: formats the value.
        width: characters that the value is padded to, so that lines align.
        rank: the cells of the highest ranks are left out first where the terminal is narrow.
    """

    metric: str
    label: str
    show: Callable[[float], str]
    width: int
    rank: int


CELLS = (
    Cell("reward", "reward", fixed(3), 6, 0),
    Cell("eval/reward", "eval", fixed(3), 6, 0),
    Cell("eval/accuracy", "accuracy", fixed(3), 5, 0),
    Cell("loss", "loss", fixed(4), 7, 1),
    Cell("entropy", "entropy", fixed(3), 5, 4),
    Cell("kl", "kl", compact, 7, 5),
    Cell("completions/mean_length", "length", fixed(1), 5, 2),
    Cell("completions/clipped_ratio", "cut", percent, 3, 3),
    Cell("eval/completions/mean_length", "length", fixed(1), 5, 2),
    Cell("eval/completions/clipped_ratio", "cut", percent, 3, 3),
    Cell("grad_norm", "grad", compact, 7, 6),
    Cell("learning_rate", "lr", compact, 7, 7),
    Cell("tokens_per_second/rollout", "gen tok/s", thousands, 5, 8),
    Cell("tokens_per_second/training", "train tok/s", thousands, 5, 9),
)
SEPARATOR = "  "


def step_line(
    step: int,
    total_steps: int | None,
    metrics: Mapping[str, Any],
    *,
    seconds: float | None = None,
    remaining: float | None = None,
    width: int | None = None,
) -> str:
    """One aligned line with what a person needs of a step.

    Args:
        step, total_steps: progress; no total is shown where it is None.
        metrics: the record. One with a ``stage`` counts the steps of that stage, of ``steps`` where given.
        seconds: that the step took.
        remaining: seconds to the end of the run; shown as the ETA.
        width: characters there are; cells are left out, least needed first, until the line fits. None: no limit.
    """
    values = numbers(metrics)
    if "stage" in metrics:
        total_steps = int(values["steps"]) if "steps" in values else None
    head = f"step {step:>{len(str(total_steps))}}/{total_steps}" if total_steps else f"step {step:>4}"
    if "stage" in metrics:
        head = f"{str(metrics['stage']).replace('_', ' ')} {head}"
    cells = [(0, head)]
    cells += [(c.rank, f"{c.label} {c.show(values[c.metric]):>{c.width}}") for c in CELLS if c.metric in values]
    if len(cells) == 1:
        cells += [(1, f"{name} {compact(values[name])}") for name in list(values)[:4]]
    if seconds is not None:
        cells.append((3, f"{seconds:5.2f} s"))
    if remaining is not None:
        cells.append((2, f"eta {duration(remaining):>5}"))
    while width is not None and len(cells) > 1 and len(SEPARATOR.join(text for _, text in cells)) > width:
        worst = max(range(1, len(cells)), key=lambda i: (cells[i][0], i))
        del cells[worst]
    return SEPARATOR.join(text for _, text in cells)
