"""The tables of docs/performance.md, each from the reports of one benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]
Rows = list[list[str]]

NAMES = {"jaxrft": "jaxrft", "jaxrft_fp8": "jaxrft in fp8", "vllm": "vLLM", "transformers": "transformers"}


def number(value: float | None) -> str:
    """Three significant digits; whole above a hundred."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 1e-4 else f"{value:.4f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A table whose first ``text`` columns are words, the others numbers."""
    head = ["---"] * text + ["---:"] * (len(columns) - text)
    filled = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, head, *filled))


def failed(start: Sequence[str], case: Report) -> list[str]:
    """A case's row where it has an error."""
    return [*start, "failed: " + case["error"].splitlines()[0].replace("|", "/")[:90]]


def grpo_step(report: Report) -> str:
    columns = (
        "Case", "Side", "Seconds a step", "Fastest", "Tokens/s", "Rollout", "Rewards", "Training", "Weights",
        "Other", "First step, cold", "Warm", "Time over jaxrft's", "Of the fastest",
    )  # fmt: skip
    rows: Rows = []
    for case in report["cases"]:
        for name, side in case["sides"].items():
            start = [f"`{case['case']['name']}`", name]
            if "error" in side:
                rows.append(failed(start, side))
                continue
            phases = side["phases"]
            times = [phases.get(phase) for phase in ("rollout", "rewards", "training", "weights", "other")]
            first = [_median(begun["seconds"] for begun in side["first_step"][kind]) for kind in ("cold", "warm")]
            ratios = [case.get(f"{what}_over_{name}") for what in ("speed", "fastest")]
            values = [side["seconds"], side["fastest_seconds"], side["tokens_per_second"], *times, *first, *ratios]
            rows.append([*start, *map(number, values)])
    return markdown(columns, rows, text=2)


def train_step(report: Report) -> str:
    columns = (
        "Model", "Length", "Type", "Rematerialisation", "Rows", "Tokens/s", "Seconds", "Utilisation", "GiB",
        "Compile, s", "Speed over torch: median steps", "Fastest steps",
    )  # fmt: skip
    rows: Rows = []
    for case in report["cases"]:
        settings = case["settings"]
        rows_are = "packed" if settings["packed"] else "padded"
        start = [settings["model"], str(settings["length"]), settings["dtype"]]
        start += [f"`{case.get('remat', settings['remat'])}`", rows_are]
        if "error" in case:
            rows.append(failed(start, case))
            continue
        values = [case["tokens_per_second"], case["seconds"], case["utilisation"]]
        values += [case["memory"]["peak_bytes"] / 2**30, case["lower_seconds"] + case["compile_seconds"]]
        values += [case.get("speed_over_torch"), case.get("fastest_over_torch")]
        rows.append([*start, *map(number, values)])
    return markdown(columns, rows, text=5)


def rollout(report: Report) -> str:
    sides = [name for name in NAMES if any(name in case for case in report["cases"])]
    peers = [name for name in sides if name != "jaxrft"]
    columns = ["Completions at once", "Prompt + response", *(f"{NAMES[name]}, tokens/s" for name in sides)]
    columns += ["jaxrft, ms a step", "Over the floor", "Without prefill, ms", "That over the floor"]
    columns += [head for peer in peers for head in (f"jaxrft / {NAMES[peer]}", "of the fastest")]
    rows: Rows = []
    for case in report["cases"]:
        start = [str(case["concurrency"]), f"{case['prompt_length']} + {case['response_length']}"]
        values = [case[name]["tokens_per_second"] for name in sides]
        values += [case["jaxrft"]["ms_per_step"], case.get("floor_ratio", {}).get("jaxrft")]
        values += [case["jaxrft"].get("ms_per_decode_step"), case.get("decode_floor_ratio", {}).get("jaxrft")]
        values += [case[peer][key] / case["jaxrft"][key] for peer in peers for key in ("seconds", "fastest_seconds")]
        rows.append([*start, *map(number, values)])
    return markdown(columns, rows, text=0)


def reward_overlap(report: Report) -> str:
    ways = list(report["cases"][0]["sides"])
    columns = ("Seconds of an answer", *(f"{way.capitalize()}, s" for way in ways), "Hidden, of what can be")
    rows = []
    for case in report["cases"]:
        seconds = [case["sides"][way]["seconds"] for way in ways]
        rows.append([f"{case['latency']:g}", *map(number, [*seconds, case["hidden"]])])
    return markdown(columns, rows)


def weight_transfer(report: Report) -> str:
    columns = ("Model", "Receiver", "Transport", "GB", "Seconds", "GB/s", "Over the copy", "Pack", "Put", "Load")
    rows: Rows = []
    for case in report["cases"]:
        start = [case["size"], case["receiver"]]
        if "error" in case:
            rows.append(failed(start, case))
            continue
        values = [case["bytes"] / 1e9, case["seconds"], case["gb_per_second"], case["speed_over_copy"]]
        values += [case["parts"].get(part) for part in ("pack", "put", "load")]
        ends = sum(case["parts"].get(part, 0.0) for part in ("begin", "finish"))
        rows.append([*start, case["transport"], *map(number, [*values, ends])])
    return markdown([*columns, "Pause and resume"], rows, text=3)


def attention(report: Report) -> str:
    columns = ("Heads", "Mask", "Rows", "Length", "By", "Forward, ms", "With gradient, ms", "Temporary MiB", "Gap")
    rows: Rows = []
    for case in report["cases"]:
        start = [case["shape"], case["mask"], str(case["rows"]), f"{case['length']:,}"]
        for name, kernel in case["kernels"].items():
            if "error" in kernel:
                continue
            memory = kernel.get("temporary_bytes")
            values = [1e3 * kernel["forward_seconds"], 1e3 * kernel["seconds"], memory and memory / 2**20]
            rows.append([*start, name, *map(number, values), f"{kernel['gap']:.0e}" if "gap" in kernel else "-"])
    return markdown(columns, rows, text=5)


def decode_attention(report: Report) -> str:
    """Dense, the usual kernel and an older one, and of the others the three that are the fastest in some case."""
    cases = [{k: v for k, v in case["kernels"].items() if "error" not in v} for case in report["cases"]]
    shown = [name for name in ("dense", "usual", "before") if any(name in kernels for kernels in cases)]
    for kernels in cases:
        shown += sorted(kernels, key=lambda name: kernels[name]["seconds"])[:3]
    columns = ["By"]
    for case in report["cases"]:
        columns += [f"{case['shape']}, {case['slots']} slots: microseconds", "TB/s"]
    rows: Rows = []
    for name in dict.fromkeys(shown):
        values: list[float | None] = []
        for kernels, case in zip(cases, report["cases"]):
            seconds = kernels[name]["seconds"] if name in kernels else None
            values += [seconds and 1e6 * seconds, seconds and case["bytes"] / seconds / 1e12]
        rows.append([name, *map(number, values)])
    return markdown(columns, rows)


def projection(report: Report) -> str:
    columns = (
        "Tokens", "Hidden size", "Type", "Kernel", "Pass", "Side", "Seconds", "Over the products'", "Of the fastest",
        "Utilisation", "Temporary MiB",
    )  # fmt: skip
    rows: Rows = []
    for case in report["cases"]:
        start = [f"{case['tokens']:,}", str(case["hidden"]), case["dtype"], "tied" if case["tied"] else "untied"]
        start.append("with gradient" if case["backward"] else "forward")
        for name, side in case["sides"].items():
            if "error" in side:
                rows.append(failed([*start, name], side))
                continue
            values = [side["seconds"], side.get("over_matmuls"), side.get("fastest_over_matmuls")]
            values += [side["utilisation"], side["temporary_bytes"] / 2**20]
            rows.append([*start, name, *map(number, values)])
    return markdown(columns, rows, text=6)


def loading(report: Report) -> str:
    columns = ("Side", "Page cache", "Seconds", "First", "GB/s", "Of the plain read's", "Of the kept read's")
    columns += ("Fresh pages, GiB", "Parameters, GiB", "Above, GiB")
    rows: Rows = []
    for case in report["cases"]:
        start = [case["side"], case["cache"]]
        if "error" in case:
            rows.append(failed(start, case))
            continue
        sizes = ("fresh_bytes", "final_bytes", "above_final_bytes")
        memory = [case[key] / 2**30 if key in case else None for key in sizes]
        speed = [case["gb_per_second"], case.get("of_raw"), case.get("of_kept")]
        values = [case["seconds"], case["first_seconds"], *speed, *memory]
        rows.append([*start, *map(number, values)])
    return markdown(columns, rows, text=2)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
