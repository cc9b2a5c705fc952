"""A full disk: one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from jaxrft.config import ConfigError

_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# Array storage reports the system's error in words.
_WORDS = ("No space left", "File too large", "Disk quota exceeded")


class DiskFullError(ConfigError):
    """There is no room to write; the message says where."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    return getattr(error, "errno", None) in _ERRNOS or any(word in str(error) for word in _WORDS)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns any error of a full disk into a :class:`DiskFullError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_full(error):
            raise
        raise DiskFullError(
            f"no room to write in {folder}: free some space, then continue with resume_from_checkpoint=true; "
            "checkpoints that were finished are whole"
        ) from error
