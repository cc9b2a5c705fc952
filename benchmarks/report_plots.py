"""The plots of docs/performance.md, each from one report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Plot = Callable[[Report, Callable[..., Any]], None]
PHASES = {"rollout": "#3b6fb6", "rewards": "#b3b3b3", "training": "#d98032", "weights": "#4f9d69", "other": "#7a5195"}
COLOURS = {"jaxrft": "#3b6fb6", "trl": "#d98032", "tunix": "#4f9d69", "vllm": "#4f9d69", "transformers": "#d98032"}
COLOURS |= {"torch": "#d98032", "jaxrft_fp8": "#7a5195"}
# Of sides that are no product, in the order in which they come.
OTHERS = ("#4f9d69", "#7a5195", "#b3b3b3", "#c2a545", "#5fb0b7")
NAMES = {"trl": "TRL", "vllm": "vLLM", "jaxrft_fp8": "jaxrft in fp8"}
# A change of how plots look changes what they are made from.
STYLE = 6


def grpo_step(report: Report, axes_of: Callable[..., Any]) -> None:
    """For each case a row of bars, sides by phase, and under it their first steps."""
    cases = [c for c in report["cases"] if any("phases" in side for side in c["sides"].values())]
    axes = axes_of(2, len(cases), 4.6 * len(cases), 4.6)
    for above, below, case in zip(axes, axes[len(cases) :], cases):
        sides = {name: side for name, side in case["sides"].items() if "phases" in side}
        _phases(above, case["case"], sides)
        _first_steps(below, sides)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=len(PHASES), frameon=False)


def _phases(axis: Any, shape: dict[str, Any], sides: dict[str, Any]) -> None:
    left = dict.fromkeys(sides, 0.0)
    for phase, colour in PHASES.items():
        widths = {name: side["phases"].get(phase, 0.0) for name, side in sides.items()}
        axis.barh(list(sides), list(widths.values()), left=list(left.values()), color=colour, label=phase)
        left = {name: left[name] + widths[name] for name in sides}
    for name, end in left.items():
        axis.text(end, name, f" {sides[name]['seconds']:#.3g}", va="center")
    axis.set_title(f"{shape['name']}: {shape['prompts']} x {shape['group']} x {shape['new_tokens']} tokens")
    _times(axis, list(sides), 1.2 * max(left.values()), "seconds a step, medians (less is better)")


def _first_steps(axis: Any, sides: dict[str, Any]) -> None:
    """From the start of a process; of sides without a cache of programs a single bar."""
    ends = [0.0]
    for kind, place, colour in (("cold", -0.2, "#9db7da"), ("warm", 0.2, "#3b6fb6")):
        for row, side in enumerate(sides.values()):
            if found := [begun["seconds"] for begun in side["first_step"][kind]]:
                ends.append(statistics.median(found))
                axis.barh(row + place, ends[-1], 0.38, color=colour)
                axis.text(ends[-1], row + place, f" {ends[-1]:#.3g} {kind}", va="center", fontsize=8)
    _times(axis, list(sides), 1.3 * max(ends) or 1.0, "seconds from start to the first step's end")


def _times(axis: Any, sides: list[str], limit: float, what: str) -> None:
    axis.set_xlabel(what)
    axis.set_xlim(0, limit)
    axis.set_yticks(range(len(sides)), [NAMES.get(name, name) for name in sides])
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=6)


def rollout(report: Report, axes_of: Callable[..., Any]) -> None:
    """Tokens per second by completions at once, and a decode step over the least time for its bytes."""
    cases = report["cases"]
    sides = [name for name in ("jaxrft", "jaxrft_fp8", "vllm", "transformers") if name in cases[0]]
    labels = [f"{c['concurrency']}\n{c['prompt_length']} + {c['response_length']}" for c in cases]
    left, right = axes_of(1, 2, max(9.0, 2.6 * len(cases)), 3.4)
    values = {name: [case[name]["tokens_per_second"] for case in cases] for name in sides}
    _groups(left, labels, values, "tokens per second (more is better)")
    floors = [{**case.get("floor_ratio", {}), **case.get("decode_floor_ratio", {})} for case in cases]
    over = {name: [floor.get(name) for floor in floors] for name in sides}
    _groups(right, labels, over, "decode step over floor (less is better)")
    for axis in (left, right):
        axis.set_xlabel("completions at once, tokens of prompt + response")


def train_step(report: Report, axes_of: Callable[..., Any]) -> None:
    """Tokens per second and memory by case, ours and torch's."""
    cases = [case for case in report["cases"] if "error" not in case]
    labels = []
    for case in cases:
        settings = case["settings"]
        labels.append(f"{settings['model']}, {settings['length']}\n{case['remat']}, {_rows(settings)}")
    speeds = {
        "jaxrft": [case["tokens_per_second"] for case in cases],
        "torch": [case.get("torch", {}).get("tokens_per_second") for case in cases],
    }
    peaks = {
        "jaxrft": [case["memory"]["peak_bytes"] / 2**30 for case in cases],
        "torch": [_gib(case.get("torch", {}).get("peak_bytes")) for case in cases],
    }
    # On a host only the compiled program's own figures are known.
    measured = all(case["memory"]["source"].startswith("device") for case in cases)
    axes = axes_of(1, 1 + measured, max(4.5, 1.4 * len(cases)) * (1 + measured), 3.4)
    _groups(axes[0], labels, speeds, "tokens per second (more is better)")
    if measured:
        _groups(axes[1], labels, peaks, "GiB at the peak (less is better)")
    for axis in axes:
        axis.set_xlabel("model, tokens of the longest sample;\nrematerialisation, rows (padding does not count)")


def _rows(settings: dict[str, Any]) -> str:
    return "packed" if settings["packed"] else "padded"


def _gib(size: float | None) -> float | None:
    return size and size / 2**30


def reward_overlap(report: Report, axes_of: Callable[..., Any]) -> None:
    """Seconds by what an answer takes."""
    cases = report["cases"]
    [axis] = axes_of(1, 1, max(5.0, 2.2 * len(cases)), 3.4)
    names = list(cases[0]["sides"])
    values = {name: [case["sides"][name]["seconds"] for case in cases] for name in names}
    _groups(axis, [f"{case['latency']:g}" for case in cases], values, "seconds (less is better)")
    axis.set_xlabel("seconds of one answer of the reward's service")


def weight_transfer(report: Report, axes_of: Callable[..., Any]) -> None:
    """GB per second by model and receiver, beside a copy of as many bytes."""
    cases = [case for case in report["cases"] if "error" not in case]
    labels = [f"{case['size']}\n{case['receiver']}" for case in cases]
    values = {"jaxrft": [c["gb_per_second"] for c in cases], "plain copy": [c["copy"]["gb_per_second"] for c in cases]}
    [axis] = axes_of(1, 1, max(5.0, 1.3 * len(cases)), 3.4)
    _groups(axis, labels, values, "GB per second (more is better)")
    axis.set_xlabel("model, receiver")


def attention(report: Report, axes_of: Callable[..., Any]) -> None:
    """Time with gradients by mask and length; of kernels in several tiles the usual ones."""
    cases = report["cases"]
    found = [
        {name: 1e3 * kernel["seconds"] for name, kernel in case["kernels"].items() if "error" not in kernel}
        for case in cases
    ]
    names = [name for name in dict.fromkeys(name for kernels in found for name in kernels) if " " not in name]
    several = len({case["shape"] for case in cases}) > 1
    labels = [
        f"{case['shape'] + ', ' if several else ''}{case['mask']}\n{case['rows']} x {case['length']}" for case in cases
    ]
    [axis] = axes_of(1, 1, max(5.0, 1.1 * len(cases)), 3.4)
    values = {name: [kernels.get(name) for kernels in found] for name in names}
    _groups(axis, labels, values, "ms with gradients (less is better)")
    axis.set_xlabel("mask, rows x tokens")


def decode_attention(report: Report, axes_of: Callable[..., Any]) -> None:
    """Bytes of keys and values per second: whole scores, the usual kernel, an older one, and each case's fastest."""
    cases = report["cases"]
    speeds: list[dict[str, float]] = []
    for case in cases:
        ran = {name: kernel for name, kernel in case["kernels"].items() if "error" not in kernel}
        speeds.append({name: case["bytes"] / kernel["seconds"] / 1e12 for name, kernel in ran.items()})
    usual = [name for name in ("dense", "usual", "before") if any(name in speed for speed in speeds)]
    fastest = [max(speed, key=lambda name: speed[name]) for speed in speeds if speed]
    labels = [f"{case['shape']}\n{case['slots']}" for case in cases]
    [axis] = axes_of(1, 1, max(5.0, 1.3 * len(cases)), 3.4)
    values = {name: [speed.get(name) for speed in speeds] for name in dict.fromkeys([*usual, *fastest])}
    _groups(axis, labels, values, "TB of keys and values a second\n(more is better)")
    axis.set_xlabel("heads, slots")


def projection(report: Report, axes_of: Callable[..., Any]) -> None:
    """Time over that of the bare products in the same chunks."""
    cases = report["cases"]
    names = dict.fromkeys(name for case in cases for name in case["sides"])
    labels = []
    for case in cases:
        way = "with gradient" if case["backward"] else "forward"
        labels.append(f"{case['tokens']} x {case['hidden']}\n{'tied' if case['tied'] else 'untied'}, {way}")
    [axis] = axes_of(1, 1, max(5.0, 2.0 * len(cases)), 3.4)
    values = {name: [case["sides"].get(name, {}).get("over_matmuls") for case in cases] for name in names}
    _groups(axis, labels, values, "time over the products' (less is better)")
    axis.axhline(1.0, color="#666666", linewidth=0.8)
    axis.set_xlabel("tokens x hidden size, kernel, pass")


def loading(report: Report, axes_of: Callable[..., Any]) -> None:
    """GB per second by side, with the files in the page cache and out of it."""
    cases = [case for case in report["cases"] if "error" not in case]
    caches, sides = (list(dict.fromkeys(case[key] for case in cases)) for key in ("cache", "side"))
    speeds = {(case["side"], case["cache"]): case["gb_per_second"] for case in cases}
    axes = axes_of(1, len(caches), 4.6 * len(caches), 3.0)
    for axis, cache in zip(axes, caches):
        axis.bar(sides, [speeds.get((side, cache), math.nan) for side in sides], color=[_colour(s) for s in sides])
        axis.set_title(f"page cache {cache}")
        axis.set_ylabel("GB per second (more is better)")
        axis.tick_params(axis="x", labelsize=8)


def _groups(axis: Any, labels: list[str], values: dict[str, list[float | None]], what: str) -> None:
    """Bars side by side for each label; a side that is nowhere is left out."""
    values = {name: heights for name, heights in values.items() if any(heights)}
    width = 0.8 / max(1, len(values))
    for number, (name, heights) in enumerate(values.items()):
        places = [index + (number - (len(values) - 1) / 2) * width for index in range(len(heights))]
        axis.bar(places, _numbers(heights), width * 0.95, label=NAMES.get(name, name), color=_colour(name, number))
    axis.set_xticks(range(len(labels)), labels)
    # Few bars stay narrow.
    margin = 0.5 + max(0.0, (3 - len(labels)) / 2)
    axis.set_xlim(-margin, len(labels) - 1 + margin)
    axis.set_ylabel(what)
    if len(values) > 1:
        # Above the bars.
        highest = max(height for heights in values.values() for height in heights if height)
        axis.set_ylim(0, 1.25 * highest)
        axis.legend(frameon=False, ncols=len(values), loc="upper right", columnspacing=1.0, handlelength=1.2)


def _numbers(heights: Iterable[float | None]) -> list[float]:
    return [math.nan if height is None else height for height in heights]


def _colour(name: str, number: int = 2) -> str:
    return COLOURS.get(name, OTHERS[number % len(OTHERS)])


def draw(plot: Plot, report: Report, path: Path, digest: str) -> None:
    """Writes a PNG on a light background; what it was made from goes along as text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []

    def axes_of(rows: int, columns: int, width: float, height: float) -> list[Any]:
        figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
        made.append(figure)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        return list(axes.flat)

    with pyplot.rc_context({"font.size": 10, "axes.titlesize": 10, "figure.facecolor": "white"}):
        plot(report, axes_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        made[0].savefig(path, dpi=130, metadata={"Source": digest})
    pyplot.close(made[0])


def digest_of(path: Path) -> str | None:
    """What a plot was made from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source")
