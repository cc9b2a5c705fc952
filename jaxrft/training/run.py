"""A run from the command line: build the trainer, train, and say how it ended."""

from __future__ import annotations

import contextlib
import sys

from jaxrft.config import RLConfig
from jaxrft.rollout.errors import EngineError
from jaxrft.training.audit import AuditError
from jaxrft.training.folder import RunFolder
from jaxrft.training.interrupts import Interrupted
from jaxrft.training.trainer import RLTrainer
from jaxrft.training.watchdog import PhaseTimeout

AUDIT_FAILED = 3
ENGINE_FAILED = 4
TIMED_OUT = 75


def run(config: RLConfig) -> int:
    """Trains as the config says.

    Returns:
        The process's exit code: 0; 3 where the audit or the check of parity stopped the run, 4 where an engine
        failed, 75 where a phase took too long, 128 + signal where one ended it.

    Raises:
        ConfigError: the config cannot be run.
    """
    # Before anything is loaded: a taken folder is the commonest mistake.
    RunFolder(config.output_dir).check(config.resume_from_checkpoint)
    try:
        with contextlib.closing(RLTrainer(config=config)) as trainer:
            trainer.train()
    except Interrupted as error:
        return 128 + error.signal_number
    except AuditError as error:
        print(f"error: {error}", file=sys.stderr)
        return AUDIT_FAILED
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ENGINE_FAILED
    except PhaseTimeout as error:
        print(f"error: {error}", file=sys.stderr)
        return TIMED_OUT
    return 0
