"""``python -m jaxrft.train CONFIG.yaml [key=value ...]``: one run, as its config says.

The config is read before JAX is imported, because devices, memory and XLA's flags can be
chosen only then.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import jaxrft
from jaxrft.config import ConfigError, environment
from jaxrft.config.help import USAGE, help_text
from jaxrft.config.parse import parse, to_yaml

USER_ERROR = 2
# Task -> the module whose run(config) does it. Imported only then: they import JAX.
TASKS = {"rl": "jaxrft.training.run"}


def main(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code: 0, 2 for a user's mistake, 128 + signal."""
    if not arguments:
        print(USAGE, file=sys.stderr, end="")
        return USER_ERROR
    flags = [argument for argument in arguments if argument in ("-h", "--help", "--version", "--print-config")]
    try:
        if flags:
            _show(flags[0], arguments)
            return 0
        return _run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:  # Before the trainer takes over, or after it has saved.
        return 128 + signal.SIGINT


def _show(flag: str, arguments: Sequence[str]) -> None:
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # As in `--help | head`.
    try:
        if flag == "--print-config":
            print(to_yaml(parse([argument for argument in arguments if argument != flag])), end="")
        else:
            print(f"jaxrft {jaxrft.__version__}" if flag == "--version" else help_text())
        sys.stdout.flush()
    finally:
        # Left so, a process that goes on would end without a word where it next writes to a closed pipe or socket.
        signal.signal(signal.SIGPIPE, before)


def _run(arguments: Sequence[str]) -> int:
    config = parse(arguments)
    environment.apply(config.parallel)
    return importlib.import_module(TASKS[config.task]).run(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
