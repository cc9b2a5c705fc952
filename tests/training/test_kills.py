"""Runs that are ended from outside, as processes: Ctrl-C, a kill, a phase that hangs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxrft.tracking import read_metrics
from tests.conftest import ROOT

RUN = """
import sys
sys.path.insert(0, {root!r})
from tests.training.tiny import ROWS, digits, tiny_config
from jaxrft import RLTrainer
from jaxrft.config import RewardsConfig, WatchdogConfig
from jaxrft.training import Interrupted
import os, time
def slow(completions, **_):
    print("reward called", flush=True)
    time.sleep({pause})
    return digits(completions)
slow.__name__ = "digits"
config = tiny_config({folder!r}, max_steps={steps}, save_steps=1, save_total_limit=3,
                     resume_from_checkpoint=os.path.exists({folder!r} + "/config.yaml"),
                     watchdog=WatchdogConfig(rewards={budget}), rewards=RewardsConfig(overlap={overlap}))
try:
    RLTrainer(config=config, reward_funcs=slow, train_dataset=ROWS).train()
except Interrupted as error:
    sys.exit(128 + error.signal_number)
"""


def start(folder, steps=6, pause=0.0, budget=600.0, overlap=False):
    code = RUN.format(root=str(ROOT), folder=str(folder), steps=steps, pause=pause, budget=budget, overlap=overlap)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(folder, step, process, seconds=300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists():
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            if lines and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.05)
    raise AssertionError(
        f"step {step} was not reached: {process.communicate()[0] if process.poll() is not None else ''}"
    )


def lasting(folder):
    moving = ("time", "compiles", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in r.items() if not k.startswith(moving)} for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.timeout(900)
def test_ctrl_c_saves_and_the_rest_is_the_same_run(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.communicate()[0] is not None
    assert whole.returncode == 0
    process = start(tmp_path / "run", pause=0.3)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert "saved at step" in said
    assert "Traceback" not in said
    rest = start(tmp_path / "run")
    said = rest.communicate(timeout=300)[0]
    assert rest.returncode == 0, said
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_kill_loop(tmp_path):
    """SIGKILL at any moment, again and again: the run that comes through is the run that was never killed."""
    whole = start(tmp_path / "whole", steps=12)
    whole.communicate()
    assert whole.returncode == 0
    for attempt in range(30):
        process = start(tmp_path / "run", steps=12, pause=0.2)
        try:
            said = process.communicate(timeout=4.0 + 1.7 * attempt % 5)[0]
            assert process.returncode == 0, said
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    else:
        rest = start(tmp_path / "run", steps=12)
        assert rest.communicate()[0] is not None
        assert rest.returncode == 0
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_phase_that_hangs_ends_the_run(tmp_path, overlap):
    process = start(tmp_path / "run", pause=600.0, budget=1.0, overlap=overlap)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "watchdog.rewards" in said
    assert "slow" in (tmp_path / "run" / "watchdog.txt").read_text()


def test_ctrl_c_does_not_wait_for_a_reward_in_its_thread(tmp_path):
    """Nor does the end of the process. The run is saved at the step that was whole."""
    process = start(tmp_path / "run", pause=600.0, overlap=True)
    for line in process.stdout:
        # Another thread's line may be on this one.
        if "reward called" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "saved at step 0" in said
    assert "Traceback" not in said
    rest = start(tmp_path / "run", steps=1, overlap=True)
    said = rest.communicate(timeout=300)[0]
    assert rest.returncode == 0, said
