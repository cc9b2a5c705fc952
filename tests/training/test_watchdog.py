"""The watchdog, in processes that hang in every way a run may."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxrft.config import WatchdogConfig
from jaxrft.training.watchdog import PhaseTimeout, Watchdog

BUDGET, GRACE = 0.3, 1.0

PROGRAM = f"""
import ctypes, random, sys, threading, time
from pathlib import Path
from jaxrft.config import WatchdogConfig
from jaxrft.training import watchdog as module
from jaxrft.training.watchdog import PhaseTimeout, Watchdog

watchdog = Watchdog(WatchdogConfig(rollout={BUDGET}, rewards=30.0), Path(sys.argv[1]), grace={GRACE})

def stuck_in_c(library):
    # A mutex locked twice waits for ever, and unlike sleep() no signal wakes it.
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def swallowing():
    while True:
        try:
            time.sleep(30)
        except BaseException:
            pass

def in_a_thread():
    def target():
        with watchdog.phase("rollout"):
            time.sleep(30)
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()

def reward_that_hides_exceptions():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def nested_within_budget():
    with watchdog.phase("rewards"):
        pass
    with watchdog.phase("rewards"):
        time.sleep(30)

def racing():
    # Phases that end just when their time is over: hundreds of coin tosses between an end and a time-out.
    racing = Watchdog(WatchdogConfig(training=0.002, rewards=0.0022), Path(sys.argv[1]), grace=20)
    tally, end, generator = [0, 0], time.monotonic() + 2.5, random.Random(0)
    while time.monotonic() < end:
        until = time.monotonic() + generator.uniform(0.0017, 0.0023)
        try:
            with racing.phase("training"), racing.phase("rewards"):
                while time.monotonic() < until:
                    pass
            tally[0] += 1
        except PhaseTimeout:
            tally[1] += 1
        assert threading.active_count() == 1
    print("race", min(tally) > 0, threading.active_count())

cases = {{
    "sleep": lambda: time.sleep(30),
    "python": lambda: [None for _ in iter(int, 1)],
    "lock": lambda: threading.Event().wait(),
    "exceptions": reward_that_hides_exceptions,
    "nested": nested_within_budget,
    "c": lambda: stuck_in_c(ctypes.CDLL(None)),
    "gil": lambda: stuck_in_c(ctypes.PyDLL(None)),
    "swallow": swallowing,
}}
module._LAST_RESORT = 0.5
try:
    if sys.argv[2] in ("thread", "race"):
        in_a_thread() if sys.argv[2] == "thread" else racing()
    else:
        with watchdog.phase("rollout"):
            cases[sys.argv[2]]()
except PhaseTimeout as error:
    print("caught", error.phase, error.budget, threading.active_count(), error)
    time.sleep({GRACE} + 1.0)  # whatever was still armed would end the process now
    print("alive")
"""

RAISED = ("sleep", "python", "lock", "exceptions", "nested")
KILLED = ("c", "swallow", "thread")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(exit status, standard output, standard error, report, seconds) of each case; all run at once."""
    started = {}
    for name in (*RAISED, *KILLED, "gil", "race"):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-c", PROGRAM, str(folder), name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = (folder, time.monotonic(), subprocess.Popen(command, **pipes))
    found = {}
    for name, (folder, start, process) in started.items():
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        report = folder / "watchdog.txt"
        text = report.read_text() if report.exists() else ""
        found[name] = (process.returncode, output, errors, text, time.monotonic() - start, report)
    return found


@pytest.mark.parametrize("case", RAISED)
def test_python_code_over_its_budget_gets_the_exception(outcomes, case):
    status, output, errors, report, _, path = outcomes[case]
    assert status == 0, errors
    first, last = output.splitlines()
    assert first.startswith(f"caught rollout {BUDGET} 1 rollout took longer than its budget of {BUDGET} s")
    assert last == "alive"
    for part in ("watchdog: rollout took longer", f"{BUDGET} s", "raise watchdog.rollout", str(path)):
        assert errors.count(part) == 1, errors
    assert "is MainThread" in report
    where = {"sleep": "<lambda>", "exceptions": "reward_that_hides_exceptions", "nested": "nested_within_budget"}
    assert f" in {where.get(case, '<module>')}" in report


@pytest.mark.parametrize("case", KILLED)
def test_a_phase_that_cannot_be_ended_ends_the_process(outcomes, case):
    status, output, errors, report, seconds, _ = outcomes[case]
    assert status == 75
    assert output == ""
    assert errors.index("rollout took longer") < errors.index(f"rollout has not ended {GRACE:g} s after its time-out")
    assert f" in { {'c': 'stuck_in_c', 'swallow': 'swallowing', 'thread': 'target'}[case] }" in report
    assert seconds >= BUDGET + GRACE


def test_a_call_that_holds_pythons_lock_is_ended_too(outcomes):
    status, output, errors, _, _, _ = outcomes["gil"]
    assert (status, output) == (1, "")
    assert " in stuck_in_c" in errors


def test_a_phase_that_ends_just_in_time_or_not_is_one_or_the_other(outcomes):
    status, output, errors, _, _, _ = outcomes["race"]
    assert (status, output) == (0, "race True 1\n"), errors[-2000:]


def test_phases_within_their_budgets_leave_nothing_behind(tmp_path):
    budgets = WatchdogConfig(rollout=30.0, rewards=None, training=1.2)
    watchdog = Watchdog(budgets, tmp_path)
    with watchdog.phase("rollout"):
        pass
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    threads = threading.active_count()
    for _ in range(20):
        with watchdog.phase("rollout"), watchdog.phase("rewards"), watchdog.phase("rollout"):
            assert threading.active_count() == threads + 2
    with pytest.raises(KeyError), watchdog.phase("rollout"):
        raise KeyError
    for _ in range(3):  # budgets are of one phase, not of all together
        with watchdog.phase("training"):
            time.sleep(0.5)
    assert threading.active_count() == threads
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert not watchdog.report.exists()
    with pytest.raises(ValueError, match="phase 'rollouts' has no budget; takes one of rollout, rewards"):
        watchdog.phase("rollouts")


def test_the_same_watchdog_goes_on_after_a_time_out(tmp_path, capfd):
    watchdog = Watchdog(WatchdogConfig(rollout=0.05, training=30.0), tmp_path)
    for _ in range(3):
        timeout = pytest.raises(PhaseTimeout, match="rollout took longer")
        with timeout, watchdog.phase("training"), watchdog.phase("rollout"):
            time.sleep(20)
    assert watchdog.report.read_text().count("rollout: over its budget of 0.05 s") == 3


def test_an_error_of_the_phase_itself_is_not_replaced(tmp_path, capfd):
    watchdog = Watchdog(WatchdogConfig(rollout=0.05), tmp_path)

    def failing():
        with watchdog.phase("rollout"):
            try:
                time.sleep(20)
            except PhaseTimeout:
                raise KeyError from None

    with pytest.raises(KeyError):
        failing()
    assert not any("watchdog" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("own", [None, KeyError])
def test_a_time_out_in_another_thread_comes_up_at_the_end_of_its_phase(tmp_path, capfd, own):
    watchdog, caught = Watchdog(WatchdogConfig(rollout=0.05), tmp_path), []

    def target():
        try:
            with watchdog.phase("rollout"):
                time.sleep(0.3)
                if own:
                    raise own
        except (PhaseTimeout, KeyError) as error:
            caught.append(type(error))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert caught == [own or PhaseTimeout]


def test_a_report_that_cannot_be_written_goes_to_standard_error(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    watchdog = Watchdog(WatchdogConfig(rollout=0.05), tmp_path / "file")
    with pytest.raises(PhaseTimeout), watchdog.phase("rollout"):
        time.sleep(20)
    errors = capfd.readouterr().err
    assert "watchdog.txt could not be written" in errors
    assert "test_a_report_that_cannot_be_written" in errors
