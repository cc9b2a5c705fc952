"""Pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrft.tracking.loggers import is_number, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]

# Okabe and Ito's colours, which people with a colour-vision deficiency can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
# Names under which a supervised stage may report what RL reports as eval/reward.
ACCURACIES = ("eval/accuracy", "eval/reward", "accuracy")
# Share of the picture's width that a supervised stage takes beside RL; its steps are of another kind.
SUPERVISED_WIDTH = 0.35
SMOOTH_FROM = 8


def learning_curve(folder: Path | str, metrics: Path | str) -> Path:
    """Draws the learning curve of a run.

    Args:
        folder: where ``curve.png`` goes.
        metrics: a run's ``metrics.jsonl``.

    Returns:
        The picture's path.

    Raises:
        ValueError: the run has logged nothing.
    """
    records = read_metrics(metrics)
    if not records:
        raise ValueError(f"{metrics}: holds no records, so there is nothing to draw")
    path = Path(folder) / "curve.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(records).savefig(path, dpi=130)
    return path


def draw(records: Records) -> Figure:
    """The learning curve as a figure: reward and held-out accuracy above; entropy, length and KL below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.7, 1))
    rl = [record for record in records if "stage" not in record]
    supervised = [record for record in records if "stage" in record]
    _draw_rewards(figure.add_subplot(grid[0, :]), rl, supervised)
    _draw_entropy(figure.add_subplot(grid[1, 0]), rl)
    _draw_lengths(figure.add_subplot(grid[1, 1]), rl)
    _draw_kl(figure.add_subplot(grid[1, 2]), rl)
    return figure


def series(records: Records, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have one of the metrics; the first name found counts."""
    points = []
    for record in records:
        value = next((record[name] for name in names if is_number(record.get(name))), None)
        if value is not None:
            points.append((record["step"], value))
    points.sort(key=lambda point: point[0])
    return np.array([step for step, _ in points], float), np.array([value for _, value in points], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a tenth of the points; at the ends, over those there are."""
    half = max(len(values) // 20, 2)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (totals[high] - totals[low]) / (high - low)


def _draw_rewards(axes: Axes, rl: Records, supervised: Records) -> None:
    steps, rewards = series(rl, "reward")
    if len(steps):
        _draw_raw_and_smooth(axes, steps, rewards, BLUE, "training reward")
    held_steps, held = series(rl, "eval/reward")
    if len(held_steps):
        axes.plot(held_steps, held, color=ORANGE, marker="o", lw=2, zorder=4, label="held-out reward")
        # Before to the lower right and after to the upper left, where a rising curve leaves room.
        _annotate(axes, held_steps[0], held[0], f"before {held[0]:.3f}", right=True)
        if len(held) > 1:
            _annotate(axes, held_steps[-1], held[-1], f"after {held[-1]:.3f}", right=False)
    axes.set_ylabel("reward")
    last = max([*steps, *held_steps, 0.0])
    _whole_steps(axes, last)
    if supervised:
        _draw_supervised(axes, supervised, last)
    _fit_shares(axes)
    _finish(axes, "Reward and held-out accuracy")


def _draw_supervised(axes: Axes, records: Records, rl_last: float) -> None:
    """Draws a supervised stage left of step 0, its steps scaled to a fixed share of the width."""
    width = rl_last * SUPERVISED_WIDTH or 1.0
    steps, accuracy = series(records, *ACCURACIES)
    total = max([int(record["step"]) for record in records] + [1])
    if len(steps):
        positions = (steps / total - 1) * width
        axes.plot(positions, accuracy, color=GREEN, marker="o", ms=4, lw=1.5, label="held-out accuracy, supervised")
    axes.axvline(0, color=GREY, ls="--", lw=1)
    axes.axvspan(-width * 1.06, 0, color=GREY, alpha=0.08, lw=0)
    above = axes.get_xaxis_transform()
    axes.text(-width / 2, 0.97, "supervised", transform=above, ha="center", va="top", color=GREY)
    ticks = [tick for tick in axes.get_xticks() if 0 < tick <= rl_last]
    places = [-width, (total // 2 / total - 1) * width, 0, *ticks]
    axes.set_xticks(places, ["0", f"{total // 2}", f"{total} | 0", *(f"{tick:g}" for tick in ticks)])
    axes.set_xlim(left=-width * 1.06, right=rl_last * 1.03 or width * 0.06)
    axes.set_xlabel("supervised step")
    if rl_last:
        axes.text(rl_last * 0.02, 0.97, "RL", transform=above, ha="left", va="top", color=GREY)
        axes.set_xlabel("supervised step  |  optimizer step of RL")


def _draw_entropy(axes: Axes, rl: Records) -> None:
    steps, entropy = series(rl, "entropy")
    if len(steps):
        _draw_raw_and_smooth(axes, steps, entropy, PURPLE, "entropy")
        _from_zero(axes, entropy)
    axes.set_ylabel("nats a token")
    _finish(axes, "Entropy", legend=False, empty=not len(steps))


def _draw_lengths(axes: Axes, rl: Records) -> None:
    steps, lengths = series(rl, "completions/mean_length")
    if len(steps):
        _draw_raw_and_smooth(axes, steps, lengths, BLUE, "length")
        _from_zero(axes, lengths)
    axes.set_ylabel("mean length, tokens", color=BLUE)
    cut_steps, cut = series(rl, "completions/clipped_ratio")
    if len(cut_steps):
        share = axes.twinx()
        share.plot(cut_steps, 100 * cut, color=ORANGE, lw=1.2, marker=_marker(cut_steps), ms=4, label="truncated")
        share.set_ylim(-3, 103)
        share.set_ylabel("truncated, %", color=ORANGE)
        share.spines["top"].set_visible(False)
    _finish(axes, "Completion length and truncation", legend=False, empty=not len(steps))


def _draw_kl(axes: Axes, rl: Records) -> None:
    drawn: list[float] = []
    curves = {"kl": (GREEN, "KL to the reference"), "sampling/logprob_difference/mean": (GREY, "gap to the engine")}
    for name, (colour, label) in curves.items():
        steps, values = series(rl, name)
        if len(steps):
            axes.plot(steps, values, color=colour, lw=1.4, marker=_marker(steps), ms=4, label=label)
            drawn.extend(values)
    if drawn and max(drawn) > 0:
        # The gap is orders of magnitude smaller. Zeros and negative values (k1) stay in the linear part.
        axes.set_yscale("symlog", linthresh=1e-7 if min(drawn) >= 0 else 1e-3)
        positive = [value for value in drawn if value > 0]
        if min(drawn) >= 0:  # Whole decades, so that at least two ticks have numbers.
            low = 0.0 if min(positive) < 1e-7 else 10.0 ** math.floor(math.log10(min(positive)))
            axes.set_ylim(low, 10.0 ** math.ceil(math.log10(max(positive)) + 0.05))
    axes.set_ylabel("nats a token")
    _finish(axes, "KL", empty=not drawn)


def _draw_raw_and_smooth(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, lw=1.5, marker="o", ms=4, label=label)
        return
    axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
    axes.plot(steps, smooth(values), color=colour, lw=2, label=f"{label}, smoothed")


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) < SMOOTH_FROM else None


def _annotate(axes: Axes, x: float, y: float, text: str, *, right: bool) -> None:
    offset, horizontal, vertical = ((8, -8), "left", "top") if right else ((0, 10), "right", "bottom")
    axes.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        color=ORANGE,
        fontweight="bold",
    )


def _whole_steps(axes: Axes, last: float = math.inf) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if last <= 1:
        axes.set_xlim(-0.5, 1.5)


def _from_zero(axes: Axes, values: np.ndarray) -> None:
    top = np.nanmax(values, initial=0.0)
    axes.set_ylim(0, 1.15 * top if top > 0 else 1.0)


def _fit_shares(axes: Axes) -> None:
    """Shows the whole range from 0 to 1 where all values are shares, as exact-match rewards are."""
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [np.array([-1.0])])
    if values.min() >= 0 and values.max() <= 1:
        axes.set_ylim(-0.03, 1.12)


def _finish(axes: Axes, title: str, *, legend: bool = True, empty: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.get_xlabel():
        axes.set_xlabel("optimizer step")
        _whole_steps(axes)
    if empty:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
    elif legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, fontsize=9)
