"""Runs the benchmarks of a suite, each as a process of its own, and writes their reports.

    python -m benchmarks.run --suite cpu
    python -m benchmarks.run --suite cpu $(scripts/peers_environment.sh) --vllm ~/vllm/bin/python
    python -m benchmarks.run --suite gpu --only grpo_step train_step_1.5B_8192 --budget 540
    python -m benchmarks.run --suite gpu --missing --budget 540
    python -m benchmarks.run --suite gpu --list

Each report is NAME_SUITE.json in --output-dir, and suite_SUITE.json there says what ran, how it ended and how long it
took; a later run of some entries leaves the others' lines. A benchmark that fails does not stop the others, and makes
the exit code 1. ``python -m benchmarks.report`` then writes the tables and plots of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import command_line
from suite import PEERS, Entry, entries

FOLDER = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; 1 if any of it failed."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    chosen = [entry for entry in entries(options.suite) if not options.only or entry.name in options.only]
    if options.missing:
        chosen = [entry for entry in chosen if not report_path(entry.name, options).exists()]
    commands = {entry.name: command(entry, options) for entry in chosen}
    if options.list:
        for name, words in commands.items():
            print(f"{name}: {shlex.join(words)}")
        return 0
    options.logs.mkdir(parents=True, exist_ok=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    outcomes = {}
    for name, words in commands.items():
        if options.budget is not None and time.perf_counter() - start > options.budget:
            print(f"{name}: left out, {options.budget:.0f} s are over", flush=True)
            continue
        outcomes[name] = run(name, words, options)
        write(options.output_dir / f"suite_{options.suite}.json", outcomes)
    return int(any(outcome["exit_code"] != 0 for outcome in outcomes.values()))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to run; default: all")
    parser.add_argument("--missing", action="store_true", help="of these, run those that have no report yet")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"has {peer}: run it too, where a benchmark takes it")
    parser.add_argument("--output-dir", type=Path, default=FOLDER / "results", help="default: benchmarks/results")
    parser.add_argument("--logs", type=Path, help="folder for what the benchmarks print; default: a temporary one")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing after these")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="of one entry (default: 3600)")
    parser.add_argument("--list", action="store_true", help="print the commands, and run nothing")
    options = parser.parse_args(argv)
    names = [entry.name for entry in entries(options.suite)]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"--only: the suite {options.suite} has no {unknown[0]}; it has {', '.join(names)}")
    options.logs = options.logs or Path(tempfile.gettempdir()) / "jaxrft-benchmarks"
    return options


def command(entry: Entry, options: argparse.Namespace) -> list[str]:
    """An entry's command line."""
    words = [sys.executable, str(FOLDER / f"{entry.script}.py"), *shlex.split(entry.options)]
    for peer in entry.peers:
        if python := getattr(options, peer):
            words += [f"--{peer}", python]
    return [*words, "--output", str(report_path(entry.name, options))]


def report_path(name: str, options: argparse.Namespace) -> Path:
    """Where an entry's report is written."""
    return options.output_dir / f"{name}_{options.suite}.json"


def run(name: str, words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs one entry and prints its line."""
    log = options.logs / f"{name}_{options.suite}.log"
    # The repository's own package, whatever is installed.
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(options.timeout)
        except BaseException as error:
            # With the processes it started: a session of its own is a group of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = 124
    seconds = time.perf_counter() - start
    ended = "done" if code == 0 else f"FAILED with {code}: {last_line(log)} (all of it: {log})"
    print(f"{name}: {ended} in {seconds:.0f} s", flush=True)
    said = command_line(Path(words[1]).name, words[2:])
    return {"command": said, "exit_code": code, "seconds": round(seconds, 1)}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it printed nothing"


def write(path: Path, outcomes: dict[str, dict[str, Any]]) -> None:
    """The suite's record; entries that did not run this time keep their lines."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | outcomes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
