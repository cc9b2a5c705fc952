"""A vLLM server as a process of its own: started, waited for, ended with this one."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import httpx

from jaxrft.config import ConfigError
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.server_side.jaxrft_server import OWNER, REFUSED
from jaxrft.rollout.server_side.jaxrft_watch import end_group, start_time
from jaxrft.rollout.vllm.options import ServerOptions

POLL_SECONDS = 0.25
NEWS_SECONDS = 15.0
SECONDS_TO_END = 10.0
# What an engine process died of stands in its own lines; these say only that it died.
_CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "See root cause above", "validation error")


class ServerProcess:
    """One server; it ends when this process does, however that ends.

    Args:
        options: what it is started with.
        log: file for all that it prints.
        name: for messages.

    Raises:
        ConfigError: there is no such interpreter, or the port is taken.
    """

    def __init__(self, options: ServerOptions, log: Path, name: str = "vllm server"):
        self.options, self.log, self.name = options, log, name
        self.url = f"http://127.0.0.1:{options.port}"
        check_free(options.port)
        log.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{os.getpid()}:{start_time(os.getpid())}"
        # Behind what a server of the run before printed, where this one continues it.
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    options.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**options.environment(), OWNER: owner},
                    # Ctrl-C at the terminal is for the trainer, which then ends the server in order.
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(
                    f"rollout.vllm.python: {options.python} cannot be run ({error.strerror}); name the Python of an "
                    "environment that has vLLM, such as /path/to/venv/bin/python"
                ) from error
        self._stopping = threading.Event()
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        """Number of the process, and of the group of all that it starts."""
        return self._process.pid

    def wait(self, seconds: float, on_news: Callable[[str], None] = lambda line: None) -> None:
        """Returns when the server answers.

        Args:
            seconds: how long to wait.
            on_news: called now and then with a line about where it stands.

        Raises:
            ConfigError: it ended, for a reason that the message gives.
            EngineError: it took too long; it has been ended.
        """
        start = news = time.monotonic()
        while not self._answers():
            if self._process.poll() is not None:
                raise ConfigError(f"rollout.vllm: {self.name} did not start: {self.reason()} (log: {self.log})")
            now = time.monotonic()
            if now - start > seconds:
                self.stop()
                raise EngineError(
                    f"{self.name} did not answer within {seconds:.0f} s; last line of {self.log}: {self.last_line()}; "
                    "raise rollout.vllm.startup_seconds if it only needs longer"
                )
            if now - news >= NEWS_SECONDS:
                news = now
                on_news(f"{self.name}: starting for {now - start:.0f} s: {self.last_line()}")
            time.sleep(POLL_SECONDS)

    def follow(self, say: Callable[[str], None]) -> None:
        """From here on, errors that the server logs are passed on, until it ends."""
        file = self.log.open(errors="replace")
        file.seek(0, os.SEEK_END)
        # Not a method of this object, which the thread would keep alive.
        arguments = (file, self._process, self._stopping, lambda line, name=self.name: say(f"{name}: {line}"))
        threading.Thread(target=_follow, args=arguments, name=f"log of {self.name}", daemon=True).start()

    def check_alive(self) -> None:
        """Raises EngineError where the process has ended."""
        # It may be on its way out.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        code = self._process.poll()
        if code is not None:
            raise EngineError(f"{self.name} ended with exit code {code}: {self.reason()} (log: {self.log})")

    def reason(self) -> str:
        """Why it ended, as far as its log says."""
        return reason_in(self._printed())

    def _printed(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def last_line(self) -> str:
        """The end of its log."""
        lines = [line for line in self._printed().splitlines() if line.strip()]
        return _plain(lines[-1])[:160] if lines else "nothing yet"

    def stop(self) -> None:
        """Ends the server and all that it started; harmless when called again."""
        self._stopping.set()
        self._end()

    def _answers(self) -> bool:
        try:
            healthy = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
        # Else somebody else has taken the port.
        return healthy and self._process.poll() is None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_free(port: int) -> None:
    """Raises ConfigError where somebody listens at a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"rollout.vllm.port: {port} cannot be taken ({error.strerror}); choose another, or leave it out"
            ) from error


def reason_in(log: str) -> str:
    """The line of a server's log that says best why it ended."""
    lines = [_plain(line) for line in log.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(REFUSED):
            return line.removeprefix(REFUSED)
    for pattern in (r"Value error, (.+)", r"(?:[\w.]+\.)?(\w+(?:Error|Exception): .+)"):
        found = [m.group(1) for line in lines if (m := re.match(pattern, line.strip()))]
        found = [text for text in found if not any(word in text for word in _CONSEQUENCES)]
        if found:
            return re.sub(r" ?\[type=.*", "", found[-1])[:400]
    return lines[-1][:400] if lines else "it printed nothing"


def _plain(line: str) -> str:
    """A line of the log without colours, and without the name, level and place that vLLM puts before it."""
    return re.sub(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]+\] ?", "", _uncoloured(line))


def _uncoloured(line: str) -> str:
    """A line of the log without colours, and without the name of the process that vLLM puts before it."""
    return re.sub(r"^\(\w+ pid=\d+\) ?", "", re.sub(r"\x1b\[[0-9;]*m", "", line))


def _follow(
    file: TextIO, process: subprocess.Popen[bytes], stopping: threading.Event, say: Callable[[str], None]
) -> None:
    with file:
        while process.poll() is None and not stopping.is_set():
            line = file.readline()
            if not line:
                time.sleep(POLL_SECONDS)
            elif re.match(r"(ERROR|CRITICAL)\b", _uncoloured(line)):
                say(_plain(line.rstrip())[:400])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    # Its group is its own, and outlives it while a worker runs.
    end_group(process.pid)
    process.wait()
