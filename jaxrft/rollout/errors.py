"""What an engine raises when it cannot go on."""

from __future__ import annotations


class EngineError(RuntimeError):
    """A server failed, or cannot be what the trainer needs; the message says which, why, and what to do."""
