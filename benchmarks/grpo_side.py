"""The driver's end of a side of benchmarks/grpo_step.py: a process that works when it is told to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpo_case

FOLDER = Path(__file__).resolve().parent
# Variables that would bring this environment into another, or settings of this process into one with its own.
_DROPPED = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "JAX_COMPILATION_CACHE_DIR")


class SideError(RuntimeError):
    """A side's process has ended; says what it wrote last."""


class Side:
    """A trainer in a process of its own, started and ready for its first step.

    Args:
        name: jaxrft, jaxrft_vllm, trl or tunix; its program is grpo_NAME.py, that of both jaxrft the same.
        python: interpreter of its environment.
        case: what it runs.
        folder: with the model in ``model``; the side's files go there too.
        cache: folder of compiled programs.
        settings: more for its program.

    Attributes:
        seconds_to_ready: from the start of its process to the first step.
        seconds_to_step: from there to the end of the first step; None before.

    Raises:
        SideError: it did not come so far.
    """

    def __init__(self, name: str, python: str, case: grpo_case.Case, folder: Path, cache: Path, **settings: Any):
        self.name = name
        self._log = folder / f"{name}.log"
        program = FOLDER / f"grpo_{name.removesuffix('_vllm')}.py"
        with self._log.open("wb") as log:
            self._start = time.perf_counter()
            self._process = subprocess.Popen(
                [python, str(program), order_for(case, folder, cache, **settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(own=name.startswith("jaxrft"), cache=cache),
            )
        self.seconds_to_step: float | None = None
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.seconds_to_ready = time.perf_counter() - self._start

    def turn(self) -> dict[str, Any]:
        """Takes one step; its seconds, and what else the program says of it."""
        assert self._process.stdin is not None
        # One that has ended is found out by its answer.
        with contextlib.suppress(BrokenPipeError):
            print("step", file=self._process.stdin, flush=True)
        answer = self._read()
        if self.seconds_to_step is None:
            self.seconds_to_step = time.perf_counter() - self._start
        return answer

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        # A library may say something while it is imported, before the program could see to it.
        while line and not line.startswith("{"):
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(30)
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SideError(f"{self.name} ended with {code}: {' / '.join(lines[-3:])}"[:600])
        return json.loads(line)


def order_for(case: grpo_case.Case, folder: Path, cache: Path, **settings: Any) -> str:
    """The command line's argument for a side's program."""
    output = tempfile.mkdtemp(dir=folder)
    fixed = {"case": dataclasses.asdict(case), "folder": str(folder), "output": f"{output}/run", "cache": str(cache)}
    return json.dumps(fixed | settings)


def environment(own: bool, cache: Path | None = None) -> dict[str, str]:
    """Variables of a side's process; ``own``: it runs in this environment."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    # A server on a CPU would leave a core alone, which the other sides do not.
    kept.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if own:
        kept["PYTHONPATH"] = str(FOLDER.parent)
    elif cache is not None:
        # tunix's users set it so; jaxrft's in the config.
        kept |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    return kept


def make_model(case: grpo_case.Case, folder: Path) -> None:
    """Writes the model in ``folder``, by a process that leaves a GPU alone."""
    order = json.dumps({"case": dataclasses.asdict(case), "folder": str(folder)})
    subprocess.run(
        [sys.executable, str(FOLDER / "grpo_model.py"), order],
        check=True,
        env=environment(own=True) | {"JAX_PLATFORMS": "cpu"},
    )
