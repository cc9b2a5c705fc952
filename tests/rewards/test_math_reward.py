"""The mathematics reward: what it accepts, and that nothing in an answer can hang or outlive the trainer."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from jaxrft.config import ConfigError
from jaxrft.data import Prompt
from jaxrft.rewards import MathReward, RewardSet, load_rewards

# Each computes for minutes or for ever, most of them without letting another thread of the interpreter run.
HOSTILE = [
    "9^9^9^9^9",
    "$9^{9^{9^{9^{9}}}}$",
    r"\boxed{10^{10^{10^{10}}}}",
    r"\boxed{(10^9)!}",
    r"$\binom{10^{9}}{5 \cdot 10^8}$",
    r"$\sum_{n=1}^{10^{9}} \frac{1}{n^n}$",
    "$" + "(" * 3000 + "1" + ")" * 3000 + "$",
    "9**9**9**9**9",
    r"\boxed{" * 3000,
]


@pytest.fixture(scope="module")
def reward():
    """Has the time that a machine with other work may take for what takes a tenth of a second."""
    patient = MathReward(timeout=60.0, workers=2, memory=1.0)
    patient.start()
    yield patient
    patient.close()


@pytest.fixture
def strict():
    with_limit = MathReward(timeout=1.0, workers=2, memory=1.0)
    with_limit.start()
    yield with_limit
    with_limit.close()


def grade(reward, *pairs):
    return reward(completions=[completion for completion, _ in pairs], answer=[answer for _, answer in pairs])


def assert_ended(processes):
    """All processes end within seconds; what nobody has waited for yet has ended too."""
    deadline = time.monotonic() + 5
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def math_servers():
    return [p for p in psutil.Process().children() if "math_server.py" in " ".join(p.cmdline())]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("the sum is 46", "46", 1),
        ("12+34=46", 46, 1),
        ("the sum is 45", 46.0, 0),
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1),
        ("$x = 1/3$", "x=\\frac13", 1),
        (r"$\frac{2}{4}$", "1/2", 1),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", 1),
        (r"\boxed{(x+1)^2}", r"x^2+2x+1", 1),
        (r"\boxed{(x+1)^2}", r"x^2+2x-1", 0),
        ("1,234", "1234", 1),
        ("72", "48/2 = <<48/2=24>>24 in May.\n#### 72", 1),
        ("no number at all", "46", 0),
        ("", "46", 0),
        ("46", None, None),
        ("46", " ", None),
        ("lone surrogate \ud800 46", "46", 1),
    ],
)
def test_grades(reward, completion, answer, score):
    assert grade(reward, (completion, answer)) == [score]


def test_rows_without_an_answer_leave_the_others_in_place(reward):
    assert grade(reward, ("1", "46"), ("46", None), ("46", "46"), ("46", None)) == [0, None, 1, None]
    assert grade(reward, ("46", None)) == [None]


def test_loading_it_starts_its_processes():
    before = math_servers()
    (loaded,) = load_rewards(["math"], {"math": {"workers": 1}}, 7.0)
    # A process that has just begun may not show its command line yet.
    until(lambda: len(math_servers()) == len(before) + 1)
    assert (loaded.__name__, loaded.timeout, loaded.workers) == ("math", 7.0, 1)
    loaded.close()
    assert math_servers() == before


def test_chat_completions_and_other_columns(reward):
    chat = [[{"role": "assistant", "content": "\\boxed{46}"}], [{"role": "assistant", "content": "7"}]]
    assert reward(completions=chat, answer=["46", "46"], prompts=["a", "b"], level=[1, 2]) == [1, 0]


def test_a_large_batch_keeps_its_order(reward):
    wanted = list(range(150))
    answers = [n if n % 3 else n + 1 for n in wanted]
    padding = "x " * 2000  # more than a pipe holds
    assert grade(reward, *[(f"{padding}{n}", a) for n, a in zip(wanted, answers)]) == [float(n % 3 > 0) for n in wanted]


def test_hostile_answers_are_wrong_within_the_limit_and_others_unharmed(strict):
    strict.pop_metrics()
    pairs = [pair for text in HOSTILE for pair in ((text, "46"), ("46", "46"))]
    beats, stop = [], threading.Event()

    def beat():
        while not stop.wait(0.05):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    scores = grade(strict, *pairs, ("46", HOSTILE[0]))
    elapsed = time.monotonic() - start
    stop.set()
    thread.join()
    assert scores == [0.0, 1.0] * len(HOSTILE) + [0.0]
    assert elapsed < strict.timeout * len(HOSTILE) / strict.workers + 8
    assert strict.pop_metrics()["timeouts"] >= 5
    assert strict.pop_metrics() == {"timeouts": 0.0, "died": 0.0}
    assert max(b - a for a, b in itertools.pairwise(beats)) < 3, "the trainer's threads go on"
    assert grade(strict, ("46", "46"), ("45", "46")) == [1, 0]


def test_workers_are_limited_light_and_few(reward):
    grade(reward, ("46", "46"))
    (server,) = math_servers()
    assert len(server.children()) == 2
    assert os.getsid(server.pid) != os.getsid(0), "Ctrl-C in the trainer's terminal does not reach it"
    for process in (server, *server.children()):
        assert not any("jax" in m.path or "torch" in m.path for m in process.memory_maps())
    for child in server.children():
        assert child.rlimit(psutil.RLIMIT_AS) == (2**30, 2**30)


def test_an_answer_that_kills_its_process_is_wrong_and_counted():
    patient = MathReward(timeout=300.0, workers=1)
    before = math_servers()
    assert grade(patient, ("46", "46")) == [1]
    (server,) = (p for p in math_servers() if p not in before)
    (child,) = server.children()

    def kill_when_busy():
        while child.cpu_times().user < 0.2:
            time.sleep(0.01)
        child.kill()

    thread = threading.Thread(target=kill_when_busy)
    thread.start()
    assert grade(patient, ("46", "46"), (HOSTILE[0], "46"), ("46", "46")) == [1, 0, 1]
    thread.join()
    assert patient.pop_metrics() == {"timeouts": 0.0, "died": 1.0}
    del patient
    assert_ended([server])


def test_a_call_that_is_interrupted_leaves_no_stale_reply(reward):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            grade(reward, (HOSTILE[0], "46"), ("46", "46"), ("46", "46"))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert grade(reward, ("45", "46")) == [0]


def test_killed_or_closed_processes_start_again(reward):
    (server,) = math_servers()
    children = server.children()
    server.kill()
    server.wait()
    assert grade(reward, ("46", "46")) == [1]
    assert_ended(children)
    reward.close()
    reward.close()
    assert math_servers() == []
    assert grade(reward, ("46", "46")) == [1]


def test_a_server_that_ends_in_a_call_is_an_error(reward):
    grade(reward, ("46", "46"))
    (server,) = math_servers()
    children = server.children()
    timer = threading.Timer(0.3, server.kill)
    timer.start()
    with pytest.raises(RuntimeError, match="ended by themselves"):
        grade(reward, (HOSTILE[0], "46"))
    timer.join()
    assert_ended(children)


def test_a_broken_math_verify_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rewards = RewardSet([MathReward()], on_error="none")
    prompt = Prompt(index=0, value="p", text="p", token_ids=[1], columns={"answer": "46"})
    with pytest.raises(ConfigError, match="math-verify cannot be used: ImportError: broken here"):
        rewards.score([prompt], ["46"], [[1]])
    rewards.close()


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_a_killed_trainer(busy):
    code = f"""
import psutil
from jaxrft.config import ConfigError
from jaxrft.data import Prompt
from jaxrft.rewards import MathReward, RewardSet, load_rewards
reward = MathReward(timeout=300.0, workers=2)
reward(completions=["46"], answer=["46"])
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
reward(completions={[HOSTILE[0], HOSTILE[3]]!r}, answer=["46", "46"]) if {busy} else input()
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(processes) == 3
    if busy:
        deadline = time.monotonic() + 30
        while max(p.cpu_times().user for p in processes) < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert all(p.is_running() for p in processes)
    trainer.kill()
    trainer.communicate()
    assert_ended(processes)
