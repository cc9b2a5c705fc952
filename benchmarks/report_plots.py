"""The plots of docs/performance.md, each from one report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]
PHASES = {"rollout": "#3b6fb6", "rewards": "#b3b3b3", "training": "#d98032", "other": "#7a5195"}
SIDES = {"jaxrft": "#3b6fb6", "trl": "#d98032", "tunix": "#4f9d69", "vllm": "#4f9d69", "transformers": "#d98032"}
SIDES |= {"torch": "#d98032", "jaxrft_fp8": "#7a5195"}
NAMES = {"trl": "TRL", "vllm": "vLLM", "jaxrft_fp8": "jaxrft in fp8"}
# A change of how plots look changes what they are made from.
STYLE = 3


def grpo_step(report: Report, axes_of: Callable[..., Any]) -> None:
    """A row of bars for each case: sides, by phase."""
    cases = [c for c in report["cases"] if any("phases" in side for side in c["sides"].values())]
    axes = axes_of(1, len(cases), 4.6 * len(cases), 2.9)
    for axis, case in zip(axes, cases):
        sides = {name: side for name, side in case["sides"].items() if "phases" in side}
        left = dict.fromkeys(sides, 0.0)
        for phase, colour in PHASES.items():
            widths = {name: _phase(side, phase) for name, side in sides.items()}
            axis.barh(list(sides), list(widths.values()), left=list(left.values()), color=colour, label=phase)
            left = {name: left[name] + widths[name] for name in sides}
        for name, end in left.items():
            axis.text(end, name, f" {sides[name]['seconds']:#.3g}", va="center")
        shape = case["case"]
        axis.set_title(f"{shape['name']}: {shape['prompts']} x {shape['group']} x {shape['new_tokens']} tokens")
        axis.set_xlabel("seconds a step, medians (less is better)")
        axis.set_xlim(0, 1.2 * max(left.values()))
        axis.set_yticks(list(left), [NAMES.get(name, name) for name in left])
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=6)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def _phase(side: dict[str, Any], phase: str) -> float:
    phases = side["phases"]
    return phases["other"] + phases.get("weights", 0.0) if phase == "other" else phases[phase]


def rollout(report: Report, axes_of: Callable[..., Any]) -> None:
    """Tokens per second by completions at once."""
    cases = report["cases"]
    sides = [name for name in ("jaxrft", "jaxrft_fp8", "vllm", "transformers") if name in cases[0]]
    labels = [f"{c['concurrency']}\n{c['prompt_length']} + {c['response_length']}" for c in cases]
    [axis] = axes_of(1, 1, max(5.0, 1.3 * len(cases)), 3.4)
    values = {name: [case[name]["tokens_per_second"] for case in cases] for name in sides}
    _groups(axis, labels, values, "tokens per second (more is better)")
    axis.set_xlabel("completions at once, tokens of prompt + response")


def train_step(report: Report, axes_of: Callable[..., Any]) -> None:
    """Tokens per second by case, ours and torch's."""
    cases = [case for case in report["cases"] if "error" not in case]
    labels = []
    for case in cases:
        settings = case["settings"]
        labels.append(f"{settings['model']}, {settings['length']}\n{case['remat']}, {_rows(settings)}")
    values = {"jaxrft": [case["tokens_per_second"] for case in cases]}
    if any("tokens_per_second" in case.get("torch", {}) for case in cases):
        values["torch"] = [case.get("torch", {}).get("tokens_per_second", 0.0) for case in cases]
    [axis] = axes_of(1, 1, max(5.0, 1.5 * len(cases)), 3.4)
    _groups(axis, labels, values, "tokens per second (more is better)")
    axis.set_xlabel("model, tokens of the longest sample; rematerialisation, rows\n(padding does not count as tokens)")


def _rows(settings: dict[str, Any]) -> str:
    return "packed" if settings["packed"] else "padded"


def _groups(axis: Any, labels: list[str], values: dict[str, list[float]], what: str) -> None:
    width = 0.8 / len(values)
    for number, (name, heights) in enumerate(values.items()):
        places = [index + (number - (len(values) - 1) / 2) * width for index in range(len(heights))]
        axis.bar(places, heights, width * 0.95, label=NAMES.get(name, name), color=SIDES[name])
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel(what)
    if len(values) > 1:
        # Above the bars.
        axis.set_ylim(0, 1.2 * max(map(max, values.values())))
        axis.legend(frameon=False, ncols=len(values), loc="upper right")


PLOTS: dict[str, Callable[..., None]] = {
    "grpo_step": grpo_step,
    "rollout": rollout,
    "train_step": train_step,
}


def draw(section: str, report: Report, path: Path, digest: str) -> None:
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
        PLOTS[section](report, axes_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        made[0].savefig(path, dpi=130, metadata={"Source": digest})
    pyplot.close(made[0])


def digest_of(path: Path) -> str | None:
    """What a plot was made from."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source")
