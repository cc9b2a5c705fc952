"""Grades mathematics in processes of its own. Runs as a script; imports math-verify and nothing of ours.

The server imports math-verify once, then forks children that grade one answer at a time, so a child
that has to be killed is replaced in milliseconds. It is a plain process with one thread and without
JAX: forking is safe here, as it is not in the trainer.

A request is one JSON line on standard input, ``[[completion, answer], ...]``; the reply is one JSON line
on standard output, a list of outcomes in the same order: 1 or 0 (right or wrong), ``null`` (the answer
column cannot be read as mathematics), ``"timeout"`` or ``"died"`` (as with too much memory). The first
line, before any request, is ``"ready"``, or ``{"error": ...}``.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import logging
import os
import resource
import selectors
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
# Caches of the libraries grow with every answer; a fresh child has none.
JOBS_OF_A_CHILD = 500


def grade(completion: str, answer: str) -> int | None:
    """1 where a completion's last answer equals the wanted one, 0 where not; None: that one cannot be read."""
    from math_verify import parse, verify

    gold = []
    if "$" not in answer and "\\boxed" not in answer:  # most often bare LaTeX, which is read only between dollars
        gold = parse(f"${answer}$", parsing_timeout=None)
    gold = gold or parse(answer, parsing_timeout=None)
    if not gold:
        return None
    return int(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


class Child:
    """A forked process that grades; killed when an answer takes too long."""

    def __init__(self, timeout: float, memory: int, inherited: list[Child]) -> None:
        jobs, self.jobs = os.pipe()
        self.outcomes, outcomes = os.pipe()
        self.job: int | None = None
        self.deadline = 0.0
        self.done = 0
        server = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            # Ends of other children's pipes, held open here, would hide the server's death from them.
            for end in (self.jobs, self.outcomes, *(e for c in inherited for e in (c.jobs, c.outcomes))):
                os.close(end)
            _serve(jobs, outcomes, server, timeout, memory)
        os.close(jobs)
        os.close(outcomes)

    def send(self, index: int, pair: list[str], timeout: float) -> None:
        """Hands it one answer, and starts its time."""
        self.job, self.deadline = index, time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError), open(self.jobs, "wb", closefd=False) as file:
            file.write(json.dumps(pair).encode() + b"\n")

    def kill(self) -> None:
        """Ends it for certain."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.jobs)
        os.close(self.outcomes)


def _serve(jobs: int, outcomes: int, server: int, timeout: float, memory: int) -> None:
    """What a child does; never returns."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the alarm and the pipe's end remain
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        with open(jobs, "rb") as file:
            for line in file:
                # The kernel's own end of this process, should the server not be there to kill it: Python code
                # could not run while one operation on a huge number holds the interpreter.
                signal.setitimer(signal.ITIMER_REAL, 2 * timeout)
                outcome = grade(*json.loads(line))
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.write(outcomes, json.dumps(outcome).encode() + b"\n")
        os._exit(0)
    except BaseException:
        os._exit(1)


class Server:
    """Grades lists of answers with several children."""

    def __init__(self, workers: int, timeout: float, memory: int) -> None:
        self.timeout, self.memory = timeout, memory
        self.children: list[Child] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        for _ in range(workers):
            self._fork()

    def _fork(self) -> None:
        child = Child(self.timeout, self.memory, self.children)
        self.children.append(child)
        self.selector.register(child.outcomes, selectors.EVENT_READ, child)

    def _replace(self, child: Child) -> None:
        self.selector.unregister(child.outcomes)
        self.children.remove(child)
        child.kill()
        self._fork()

    def grade_all(self, pairs: list[list[str]]) -> list[int | str | None]:
        """Outcomes of all pairs of completion and answer."""
        outcomes: list[int | str | None] = [None] * len(pairs)
        waiting = collections.deque(range(len(pairs)))
        while waiting or any(child.job is not None for child in self.children):
            for child in self.children:
                if child.job is None and waiting:
                    index = waiting.popleft()
                    child.send(index, pairs[index], self.timeout)
            deadlines = [child.deadline for child in self.children if child.job is not None]
            for key, _ in self.selector.select(max(0.0, min(deadlines) - time.monotonic())):
                if key.data is None:  # the trainer sends nothing while it waits: it is gone
                    self.end()
                self._receive(key.data, outcomes)
            for child in list(self.children):
                if child.job is not None and time.monotonic() >= child.deadline:
                    outcomes[child.job] = "timeout"
                    self._replace(child)
        return outcomes

    def _receive(self, child: Child, outcomes: list[int | str | None]) -> None:
        line = os.read(child.outcomes, 4096)
        if child.job is not None:
            outcomes[child.job] = json.loads(line) if line else "died"
        child.job = None
        child.done += 1
        if not line or child.done == JOBS_OF_A_CHILD:
            self._replace(child)

    def end(self) -> None:
        """Kills the children and this process."""
        for child in self.children:
            child.kill()
        os._exit(0)


def main() -> None:
    """Serves until standard input ends. Arguments: workers, seconds an answer, bytes of memory a worker."""
    workers, timeout, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    # The trainer decides when this ends: it closes standard input, or dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not become a reply
    try:
        logging.disable(logging.CRITICAL)
        grade("so it is $\\frac{1}{2}$ or 0.5", "1/2")  # compiles math-verify's patterns before the fork
        server = Server(workers, timeout, memory)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(server.grade_all(json.loads(line))), file=replies, flush=True)
    server.end()


if __name__ == "__main__":
    main()
