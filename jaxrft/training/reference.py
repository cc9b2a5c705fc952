"""The frozen reference model of a run, kept on disk so that a resumed run has the same one."""

from __future__ import annotations

import contextlib

from jaxrft.config import ConfigError
from jaxrft.parallel.host import to_device
from jaxrft.training.checkpoint import Checkpoints
from jaxrft.training.folder import RunFolder
from jaxrft.training.learner import Learner


def keep_reference(learner: Learner, folder: RunFolder) -> None:
    """Makes the present parameters the reference, and saves them."""
    learner.keep_reference()
    with contextlib.closing(Checkpoints(folder.reference, limit=1)) as store:
        store.save(0, to_device(learner.reference), {}, {})
        store.wait()


def load_reference(learner: Learner, folder: RunFolder) -> None:
    """Takes the reference of the run that is continued.

    Raises:
        ConfigError: the run began without one.
    """
    with contextlib.closing(Checkpoints(folder.reference, limit=1)) as store:
        restored = store.restore(learner.state.params)
    if restored is None:
        raise ConfigError(
            f"beta: {folder.reference} holds no reference model; a run that began without a KL cannot gain one"
        )
    learner.hold_reference(restored.state)
