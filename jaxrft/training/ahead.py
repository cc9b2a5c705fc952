"""Programs that are compiled before they are needed, while something else runs."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

logger = logging.getLogger(__name__)


class Ahead:
    """A jitted function that can be compiled ahead, in a thread.

    Called with arguments that it was prepared for, it waits for that program; with others, it compiles as usual.
    The thread has the settings of ``jax.config.update``; what a ``with`` of JAX sets for the calling thread it has not.

    Args:
        function: of ``jax.jit``.
    """

    def __init__(self, function: Any):
        self._function = function
        self._programs: dict[Any, Future[Any]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def prepare(self, *arguments: Any) -> None:
        """Starts to compile for arguments like these; returns at once.

        Args:
            arguments: trees of ``jax.ShapeDtypeStruct`` with shardings, or of arrays.
        """
        key = _key(arguments)
        if key in self._programs:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile-ahead")
        abstract = jax.tree.map(abstract_of, arguments)
        self._programs[key] = self._pool.submit(lambda: self._function.lower(*abstract).compile())

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        key = _key(arguments) if self._programs else None
        if key not in self._programs:
            return self._function(*arguments)
        try:
            program = self._programs[key].result()
        except Exception as error:
            # There may be more memory now; what is wrong with the function itself is said by the call.
            logger.warning("could not be compiled ahead: %s", error)
            del self._programs[key]
            return self._function(*arguments)
        try:
            return program(*arguments)
        except (TypeError, ValueError) as error:  # Raised before anything runs: the arrays lie in other places.
            logger.warning("compiled ahead in vain: %s", error)
            return self._function(*arguments)

    @property
    def late(self) -> int:
        """Programs that were compiled when they were called for."""
        return self._function._cache_size()

    def lower(self, *arguments: Any) -> Any:
        """The function's program for arguments like these, not yet compiled."""
        return self._function.lower(*arguments)

    def close(self) -> None:
        """Drops what has not been begun; what is being compiled ends by itself."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def abstract_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and placement of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _key(arguments: Any) -> Any:
    leaves, treedef = jax.tree.flatten(arguments)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
