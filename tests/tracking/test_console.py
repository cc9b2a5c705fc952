"""The console on a terminal (read back through a small emulator) and in a log."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from jaxrft.tracking import Console
from jaxrft.tracking.step_line import compact, duration, step_line, thousands

METRICS = {
    "reward": 0.4321, "entropy": 1.2, "kl": 3.2e-4, "completions/mean_length": 12.34, "completions/clipped_ratio": 0.25,
    "grad_norm": 0.5, "learning_rate": 1e-6, "tokens_per_second/rollout": 12345.0, "tokens_per_second/training": 999.0,
    "time/rollout": 1.0, "time/training": 0.5, "time/compile": 0.4, "time/rewards_overlapped": 0.7,
    "rewards/a/mean": 1.0,
}  # fmt: skip
HOSTILE = "[/red][bold]x[link=http://e]\x1b[2J\x1b]0;title\x07\r\u202e\x9b1A\ud800 [/]"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def screen(output, width):
    """What a terminal of unlimited height shows."""
    lines, row, column = {}, 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
        elif token.startswith("\x1b"):
            count = int(re.sub(r"\D", "", token) or 1)
            if token.endswith("A"):
                row -= count
            elif token == "\x1b[2K":
                lines[row] = ""
            else:
                assert token.endswith("m") or token in ("\x1b[?25l", "\x1b[?25h"), repr(token)
        else:
            if column == width:
                row, column = row + 1, 0
            text = lines.get(row, "").ljust(column)
            lines[row] = text[:column] + token + text[column + 1 :]
            column += 1
    return [lines.get(i, "").rstrip() for i in range(max(lines) + 1)]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def play(console, frames=None):
    for step in (1, 2):
        with console.phase("rollout", 64) as rollout:
            for done in range(65):
                rollout.update(done)
            if frames is not None:
                console._bars._progress.refresh()
                frames.append(console._rich.file.getvalue())
            with console.phase("rewards") as rewards:
                rewards.update(3, 5)
                console.print("from", HOSTILE)
        console.step_line(step, 2, METRICS)


def test_bars_on_a_terminal_are_shown_and_leave_nothing_behind():
    file, frames = Terminal(), []
    console = Console(True, file=file, width=80)
    play(console, frames)
    assert screen(frames[0], 80)[-1].startswith("rollout ━━━")
    assert "64/64" in screen(frames[0], 80)[-1]
    assert screen(frames[1], 80)[-1].startswith("[1/2] rollout ━━━")
    output = file.getvalue()
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 2  # the cursor hides and comes back
    final = "\n".join(screen(output, 80)).rstrip("\n").split("\n")
    assert not any("━" in line or line == "" for line in final)
    assert [line[:8] for line in final if line.startswith("step")] == ["step 1/2", "step 2/2"]


def test_a_bar_ends_with_an_exception():
    console = Console(True, file=Terminal(), width=80)
    with pytest.raises(KeyError), console.phase("rollout", 2), console.phase("rewards"):
        raise KeyError
    assert console._bars._progress is None
    with console.phase("rollout") as phase:
        phase.update(1)


def test_a_log_gets_plain_lines_few_of_them():
    file = io.StringIO()
    play(Console(True, file=file))
    output = file.getvalue()
    assert all(c == "\n" or c.isprintable() for c in output), repr(output)
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("rollout")] == ["rollout 64/64 done in 0.0 s"]
    assert [line for line in lines if line.startswith("rewards")] == ["rewards 3/5 done in 0.0 s"]
    assert len(lines) == 6


def test_a_long_phase_in_a_log_gives_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jaxrft.tracking.phase.time.monotonic", lambda: now[0])
    file = io.StringIO()
    console = Console(True, file=file)
    for seconds in (0.05, 0.09, 1.0):
        with console.phase("rollout", 100) as phase:
            for done in range(1, 101):
                now[0] += seconds
                phase.update(done)
    assert file.getvalue().splitlines() == [
        "rollout 100/100 done in 5.0 s",  # the first of its kind; the second is short and says nothing
        "rollout 30/100 after 30 s",
        "rollout 60/100 after 60 s",
        "rollout 90/100 after 90 s",
        "rollout 100/100 done in 100.0 s",
    ]


def test_step_line_has_what_a_person_needs():
    line = step_line(7, 100, METRICS, seconds=1.5, remaining=3700)
    for part in (
        "step   7/100", "reward  0.432", "entropy 1.200", "kl 3.2e-04", "length  12.3", "cut 25%", "grad     0.5",
        "lr 1.0e-06", "gen tok/s 12.3k", "train tok/s   999", "1.50 s", "eta 1:01:40",
    ):  # fmt: skip
        assert part in line
    other = step_line(99, 100, METRICS | {"reward": -2.5, "kl": 0.5, "learning_rate": 0.0}, seconds=12.25, remaining=5)
    assert [m.start() for m in re.finditer("[a-z]+ ", line)] == [m.start() for m in re.finditer("[a-z]+ ", other)]
    assert step_line(5, 9, {"stage": "warm_start", "steps": 40, "loss": 1.0, "eval/accuracy": 0.5}) == (
        "warm start step  5/40  accuracy 0.500  loss  1.0000"
    )
    assert step_line(3, None, {"mine": 2.0, "text": "x"}) == "step    3  mine 2"


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
def test_step_line_fits_narrow_terminals_and_keeps_the_reward_longest(width):
    line = step_line(7, 100, METRICS, seconds=1.5, remaining=3700, width=width)
    assert len(line) <= max(width, len("step   7/100"))
    assert ("reward" in line) == (width >= 40)
    assert ("length" in line) == (width >= 60)
    assert ("train tok/s" in line) == (width == 200)


def test_missing_and_bad_values_do_not_break_the_line():
    bad = {"reward": float("nan"), "kl": float("inf"), "completions/clipped_ratio": float("nan"), "entropy": None}
    line = step_line(1, 2, bad | {"tokens_per_second/rollout": float("inf")})
    assert "reward    nan" in line
    assert "entropy" not in line


def test_formats():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 200000)] == ["0:00", "1:00", "59:59", "1:00:00", "2d 7:33:20"]
    assert [compact(v) for v in (0, 0.5, 1234.5, 123456, -2e-5)] == ["0", "0.5", "1234", "1.2e+05", "-2.0e-05"]
    assert [thousands(v) for v in (0, 999, 1500, 2.5e6)] == ["0", "999", "1.5k", "2.5M"]


def test_eta_is_the_time_left_at_the_pace_since_the_first_line(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("jaxrft.tracking.console.time.monotonic", lambda: now[0])
    file = io.StringIO()
    console = Console(True, file=file)
    for step, at in ((11, 1000.0), (12, 1010.0), (14, 1030.0)):
        now[0] = at
        console.step_line(step, 20, {"reward": 1.0})
    etas = re.findall(r"eta +([\d:]+)", file.getvalue())
    assert etas == ["1:20", "1:00"]


@pytest.mark.parametrize("make", [lambda: (Terminal(), 80), lambda: (Terminal(), 30), lambda: (io.StringIO(), None)])
def test_text_from_models_is_harmless_everywhere(make):
    file, width = make()
    console = Console(True, file=file, width=width)
    with console.phase(HOSTILE, 3) as phase:
        phase.update(1)
    console.print(HOSTILE)
    console.warn(HOSTILE)
    console.table(HOSTILE, ["prompt", HOSTILE], [[HOSTILE, HOSTILE], ["a\nb\tc", "x" * 1000]])
    console.banner(HOSTILE, {HOSTILE: HOSTILE})
    console.step_line(1, 2, {"stage": HOSTILE, HOSTILE: 1.0})
    output = file.getvalue()
    output.encode("utf-8")
    left = re.sub(r"\x1b\[(\d+(;\d+)*m|0?m|2K|1A|\?25[lh])", "", output)  # what rich itself writes
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", left.replace("\t", "")), repr(left)
    assert "[bold]" in output
    assert "\\x1b[2J\\x1b]0;title\\x07" in re.sub(r"[\s│┃]", "", left)
    assert "characters)" in left


def test_tables_banners_and_warnings():
    file = io.StringIO()
    console = Console(False, file=file)
    console.table("Samples", ["prompt", "answer"], [["1+1=", 2], ["2+2=", 4]])
    path = "/a/" + "long/" * 40 + "end"
    console.banner("run", [("folder", path), ("note", "word " * 40)])
    console.warn("careful")
    console.warn("careful")
    output = file.getvalue()
    assert re.search(r"2\+2= +│ 4 +│", output)
    assert path in output  # in one piece, to be copied
    assert max(len(line) for line in output.splitlines() if path not in line) <= 120
    assert output.count("warning: careful") == 1
    assert console.warnings == ["careful"]


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_pipe_of_any_kind_gets_plain_text(environment):
    code = (
        "from jaxrft.tracking import Console\nc = Console(True)\n"
        "with c.phase('rollout', 2) as p: p.update(2)\n"
        "c.table('T\\u00e9', ['a'], [['\\U0001f600']]); c.print('gr\\u00fc\\u00df')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | environment, timeout=60, check=True
    )
    assert b"\x1b" not in result.stdout
    assert b"rollout 2/2 done" in result.stdout
    if "PYTHONIOENCODING" in environment:
        assert b"gr\\xfc\\xdf" in result.stdout
        assert b"\\U0001f600" in result.stdout
