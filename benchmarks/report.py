"""Writes the tables and plots of docs/performance.md from the reports in benchmarks/results.

    python -m benchmarks.report
    python -m benchmarks.report --check

A section of the page stands between <!-- results:NAME --> and <!-- /results:NAME -->; its plots lie in docs/images.
results:missing names what of the suites has not been measured.
With --check nothing is written: the exit code is 1 if the page is not what the reports give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import report_plots as plots
import report_tables as tables
from report_plots import STYLE, Plot, digest_of, draw
from report_tables import Report
from suite import entries

ROOT = Path(__file__).resolve().parents[1]
MISSING = "missing"
# Name of a section -> how a report of it is shown. The reports are NAME_cpu.json, NAME_*_cpu.json, and so for a GPU.
SECTIONS: dict[str, tuple[Callable[[Report], str], Plot]] = {
    "grpo_step": (tables.grpo_step, plots.grpo_step),
    "train_step": (tables.train_step, plots.train_step),
    "logprobs": (tables.train_step, plots.train_step),
    "rollout": (tables.rollout, plots.rollout),
    "reward_overlap": (tables.reward_overlap, plots.reward_overlap),
    "weight_transfer": (tables.weight_transfer, plots.weight_transfer),
    "attention": (tables.attention, plots.attention),
    "decode_attention": (tables.decode_attention, plots.decode_attention),
    "projection": (tables.projection, plots.projection),
    "loading": (tables.loading, plots.loading),
}
SECTION = re.compile(r"<!-- results:(\w+) -->\n.*?<!-- /results:\1 -->", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks; 1 where the check finds a difference."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    before = options.page.read_text(encoding="utf-8")
    after, differences = render(before, options), []
    if after != before:
        differences.append(str(options.page))
    for section, path in all_plots(before, options):
        image, digest = plot_path(path, options), digest_for(section, path)
        if not image.exists() or digest_of(image) != digest:
            differences.append(str(image))
            if not options.check:
                draw(SECTIONS[section][1], read(path), image, digest)
    if options.check:
        for name in differences:
            print(f"{name} is not what the reports give: run python -m benchmarks.report")
        return int(bool(differences))
    options.page.write_text(after, encoding="utf-8")
    print(f"{options.page}: {', '.join(map(str, differences)) or 'nothing'} changed")
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if anything would change")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the reports")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    return parser.parse_args(argv)


def render(page: str, options: argparse.Namespace) -> str:
    """The page with all its sections made anew.

    Raises:
        SystemExit: the page has a section that no benchmark has.
    """

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name == MISSING:
            return f"<!-- results:{name} -->\n{missing(options.results)}\n<!-- /results:{name} -->"
        if name not in SECTIONS:
            raise SystemExit(f"{options.page}: no benchmark has results:{name}; there are {', '.join(SECTIONS)}")
        parts = [shown(name, path, options) for path in reports_of(name, options.results)]
        body = "\n\n".join(parts) or "*Not measured yet.*"
        return f"<!-- results:{name} -->\n{body}\n<!-- /results:{name} -->"

    return SECTION.sub(section, page)


def missing(folder: Path) -> str:
    """The entries of each suite that have no report."""
    lines = []
    for suite, words in (("gpu", "a GPU"), ("cpu", "a CPU")):
        names = [f"`{e.name}`" for e in entries(suite) if not (folder / f"{e.name}_{suite}.json").exists()]
        if names:
            lines.append(f"Not measured yet, of the suite for {words}: {', '.join(names)}.")
    return "\n\n".join(lines) or "All entries of both suites have been measured."


def reports_of(name: str, folder: Path) -> list[Path]:
    """A section's reports: the CPU's, then the GPU's; the whole first, then the parts that it is measured in."""
    found = []
    for suite in ("cpu", "gpu"):
        found += [folder / f"{name}_{suite}.json", *sorted(folder.glob(f"{name}_*_{suite}.json"))]
    return [path for path in found if path.exists()]


def shown(name: str, path: Path, options: argparse.Namespace) -> str:
    """One report: where and how it was measured, its table, its plot."""
    report = read(path)
    versions = {key: value for key, value in report["versions"].items() if value and key in SHOWN_VERSIONS}
    said = ", ".join(f"{key} {value}" for key, value in versions.items())
    when = f", {report['date'][:10]}" if "date" in report else ""
    link = f"[report](../benchmarks/results/{path.name})"
    lines = [f"Measured on {device(report)}{when} ({said}; {link}, `{report['command']}`):", ""]
    # What whoever measured had to say of it.
    lines += [report["note"], ""] if "note" in report else []
    lines.append(SECTIONS[name][0](report))
    lines += ["", f"![{name.replace('_', ' ')} on {device(report)}](images/{plot_path(path, options).name})"]
    return "\n".join(lines)


SHOWN_VERSIONS = ("jax", "torch", "transformers", "vllm")


def device(report: Report) -> str:
    """In words."""
    found = report["device"]
    if found["platform"] == "cpu":
        return f"{report['host']['cores']} CPU cores"
    return f"{found['count']} x {found['kind']}"


def all_plots(page: str, options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Sections of the page, and the reports of each."""
    for match in SECTION.finditer(page):
        if match[1] != MISSING:
            yield from ((match[1], path) for path in reports_of(match[1], options.results))


def plot_path(report: Path, options: argparse.Namespace) -> Path:
    return options.page.parent / "images" / f"benchmark-{report.stem.replace('_', '-')}.png"


def digest_for(section: str, path: Path) -> str:
    """Of what a plot shows, and of how."""
    return hashlib.sha256(f"{STYLE} {section} ".encode() + path.read_bytes()).hexdigest()


def read(path: Path) -> Report:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
