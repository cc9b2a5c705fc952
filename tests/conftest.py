"""What all tests share: the platform, the compilation cache, seeds, snippets in processes of their own.

Tests run on the CPU with one device. ``pytest -m gpu`` leaves JAX its own choice of platform.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where several devices run something small, compiling takes most of the time. The soak's whole matrix is compiled as
# users have it.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
STACKS_FOLDER = ROOT / ".pytest_cache" / "stacks"
STACKS = pytest.StashKey[TextIO]()
DEAD = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before any test module imports JAX."""
    markers = config.option.markexpr or ""
    if "gpu" not in markers:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
    # JAX writes an entry in place, so another process may read half of it: one folder a worker.
    cache = ROOT / ".pytest_cache" / "xla"
    if os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)).startswith(str(cache)):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache / os.environ.get("PYTEST_XDIST_WORKER", "main"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


# A file is run by one worker. These have few tests that take minutes: begun last, they would leave the others idle.
LONG = ("test_quickstart.py", "test_vllm_engine.py", "test_vllm_soak.py", "test_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first where several workers share the tests; skips the GPU's tests where there is none."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; there, run: pytest -m gpu")
        for item in marked:
            item.add_marker(skip)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Has a worker write what its threads did when it crashes, where the session that started it looks for it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        shutil.rmtree(STACKS_FOLDER, ignore_errors=True)
        return
    STACKS_FOLDER.mkdir(parents=True, exist_ok=True)
    session.config.stash[STACKS] = file = (STACKS_FOLDER / worker).open("w")
    faulthandler.enable(file=file)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Notes what a worker died of, for the end of the report."""
    if error is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # Interrupted, it still lives.
            node.config.stash.setdefault(DEAD, {})[node.gateway.id] = node.gateway._io.popen.wait(5)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says how the workers ended that died, and what their threads did."""
    for worker, status in config.stash.get(DEAD, {}).items():
        terminalreporter.section(f"{worker} ended with status {status} (negative: a signal; -9: perhaps out of memory)")
        file = STACKS_FOLDER / worker
        stacks = file.read_text().splitlines() if file.exists() else []
        runner = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/")
        terminalreporter.write_line("\n".join(line for line in stacks if not any(part in line for part in runner)))


@pytest.fixture(autouse=True, scope="module")
def _programs() -> Iterator[None]:
    """Lets go of what a file compiled: a worker that kept all held 4 GB halfway through."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
    if sys.platform == "linux":
        # glibc keeps what is freed between pieces in use, which after many small compilations is most of it.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every run, for code that draws from the global generators."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a snippet of Python in a process of its own and returns what it came to.

    Arguments: the code; ``devices``, its number of virtual CPU devices; ``check``, whether it must
    succeed; ``timeout`` in seconds; and environment variables by name (None removes one). With devices it is quick to
    compile, unless XLA_FLAGS says otherwise.
    """

    def run(
        code: str, *, devices: int | None = None, check: bool = True, timeout: float = 300, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, "PYTHONPATH": str(ROOT)}
        if devices is not None:
            merged |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICK_TO_COMPILE}
        merged |= environment
        env = {name: value for name, value in merged.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
        if check:
            assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
