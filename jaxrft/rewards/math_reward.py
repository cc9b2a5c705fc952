"""The reward for mathematics: math-verify, in processes that cannot hang or take down the trainer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.rewards.rules import Completion, answer_text, completion_text

SERVER = Path(__file__).with_name("math_server.py")
STARTUP_SECONDS = 120.0


class MathReward:
    """1 where a completion's last answer equals the ``answer`` column as mathematics, else 0.

    Answers are found and compared by math-verify: in ``\\boxed{}``, in LaTeX, or as a plain expression.
    An answer that takes longer than ``timeout``, or more memory than ``memory``, counts as wrong (0), whatever
    it computes: its process is killed and replaced. A row whose ``answer`` is None or cannot be read as
    mathematics gets None.

    The processes start with :meth:`start` or the first call, are kept between calls, and end with
    :meth:`close`, with this object, or with the trainer, however it ends.

    Args:
        timeout: seconds that one answer may take.
        workers: processes that grade at the same time. None: one a CPU core, 4 at most.
        memory: GiB of address space of each.

    Raises:
        ConfigError: math-verify is not installed, or a value out of range.
    """

    def __init__(self, *, timeout: float = 5.0, workers: int | None = None, memory: float = 2.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("rewards.functions: math needs the package math-verify: pip install math-verify")
        for name, value in {"timeout": timeout, "memory": memory}.items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"rewards.arguments.math.{name}: got {value!r}, takes a number above 0")
        if workers is not None and not (isinstance(workers, int) and workers > 0):
            raise ConfigError(f"rewards.arguments.math.workers: got {workers!r}, takes a whole number above 0")
        self.__name__ = "math"
        self.timeout = timeout
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._end: weakref.finalize[..., Any] | None = None
        self._lock = threading.Lock()
        self._counts = {"timeouts": 0, "died": 0}

    def __call__(self, completions: Sequence[Completion], answer: Sequence[Any], **_: Any) -> list[float | None]:
        """Grades each completion against its row's answer.

        Raises:
            ConfigError: math-verify cannot be imported.
            RuntimeError: the grading processes do not answer, or ended by themselves.
        """
        given = [i for i, wanted in enumerate(answer) if wanted is not None]
        pairs = [[completion_text(completions[i]), answer_text(answer[i])] for i in given]
        scores: list[float | None] = [None] * len(completions)
        with self._lock:
            for i, outcome in zip(given, self._grade(pairs) if pairs else []):
                self._counts["timeouts"] += outcome == "timeout"
                self._counts["died"] += outcome == "died"
                scores[i] = None if outcome is None else float(outcome == 1)
        return scores

    def pop_metrics(self) -> dict[str, float]:
        """Answers that took too long, and that ended their process, since the last call."""
        counts = {name: float(count) for name, count in self._counts.items()}
        self._counts = dict.fromkeys(self._counts, 0)
        return counts

    def start(self) -> None:
        """Starts the processes without waiting for them; nothing where they run."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        arguments = [str(self.workers), str(self.timeout), str(int(self.memory * 2**30))]
        # A process started anew, by its file and with -P: it must not inherit the trainer's threads, nor find our
        # modules in front of the standard library's. A session of its own keeps the terminal's Ctrl-C from it.
        # The hash seed is fixed because SymPy's order of terms, and with it its time, may follow it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SERVER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self._ready = False
        self._end = weakref.finalize(self, _end, self._process)

    def close(self) -> None:
        """Ends the processes; a later call starts them again."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _grade(self, pairs: list[list[str]]) -> list[int | str | None]:
        self.start()
        try:
            if not self._ready:
                started = self._receive(STARTUP_SECONDS)
                if started != "ready":
                    raise ConfigError(f"rewards: math-verify cannot be used: {started['error']}")
                self._ready = True
            process = self._running()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its end shows when there is no reply
                _write_all(process.stdin.fileno(), json.dumps(pairs).encode() + b"\n")
            # The limit of each answer is kept by the server; this one is for a server that hangs.
            return self._receive(30.0 + math.ceil(len(pairs) / self.workers) * (self.timeout + 1.0))
        except BaseException:
            # A reply that nobody waits for would be taken for the next call's.
            self.close()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _receive(self, seconds: float) -> Any:
        process = self._running()
        assert process.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"the processes of the math reward gave no answer within {seconds:.0f} s")
            data = os.read(process.stdout.fileno(), 1 << 20)
            if not data:
                raise RuntimeError(f"the processes of the math reward ended by themselves (exit code {process.wait()})")
            line += data
        return json.loads(line)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # the server kills its children and ends
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
