"""A side's end of benchmarks/grpo_step.py. The standard library alone: every side has it.

A side's process writes a line of JSON when it is ready for its first step, then takes one step for each line that it
reads, and answers with the step's seconds. In between it stands still.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Turns:
    """Waits for a side's turns and measures them.

    Attributes:
        seconds: of this step, by what was timed.
    """

    def __init__(self) -> None:
        # Whatever the trainer prints must not come between the answers.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: float | None = None
        self.seconds: dict[str, float] = defaultdict(float)

    def next(self, describe: Callable[[float], dict[str, Any]], wait: Callable[[], None] = lambda: None) -> None:
        """Ends the step under way, if any, and waits for the next turn; ends the process where there is none.

        Args:
            describe: what the answer has beside the seconds, which it is given.
            wait: for the device to finish.
        """
        wait()
        if self._start is None:
            answer = {"ready": True}
        else:
            seconds = time.perf_counter() - self._start
            answer = {"seconds": seconds, **describe(seconds)}
        print(json.dumps(answer), file=self._answers, flush=True)
        if not sys.stdin.readline():
            # Nothing of this run is to be kept, and a trainer may take its time to end.
            os._exit(0)
        self.seconds.clear()
        self._start = time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its seconds added to those of ``name``."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return run


def order() -> dict[str, Any]:
    """What the process is to do: the JSON object on its command line."""
    return json.loads(sys.argv[1])
