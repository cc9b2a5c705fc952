"""Programs that are compiled before they are needed, while something else runs."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

logger = logging.getLogger(__name__)

# As many as a run's rows have lengths: no program waits for another, which may not be needed.
THREADS = 4


class Ahead:
    """A jitted function that can be compiled ahead, in threads.

    Called with arguments that it was prepared for, it waits for that program; with others, and where that program has
    failed, it compiles as usual. The threads have the settings of ``jax.config.update``; what a ``with`` of JAX sets
    for the calling thread they have not. A process that ends waits for what is being compiled.

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
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile-ahead")
        abstract = jax.tree.map(abstract_of, arguments)
        self._programs[key] = self._pool.submit(lambda: self._function.lower(*abstract).compile())

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        key = _key(arguments) if self._programs else None
        program = self._program(key)
        if program is None:
            return self._function(*arguments)
        try:
            return program(*arguments)
        except (TypeError, ValueError) as error:  # Raised before anything runs: the arrays lie in other places.
            logger.warning("compiled ahead in vain: %s", error)
            return self._function(*arguments)

    def _program(self, key: Any) -> Any:
        """What was compiled for arguments of this key; None where nothing was."""
        future = self._programs.get(key)
        if future is None:
            return None
        try:
            return future.result()
        except BaseException as error:
            if future.done():
                del self._programs[key]
            if not isinstance(error, Exception):
                raise
            # There may be more memory now; what is wrong with the function itself is said by the call.
            logger.warning("could not be compiled ahead: %s", error)
            return None

    @property
    def late(self) -> int:
        """How often no prepared program was found, by the kinds of arguments that JAX tells apart.

        More than were compiled, perhaps: to it, replicated arrays are of several kinds.
        """
        return self._function._cache_size()

    def lower(self, *arguments: Any) -> Any:
        """The function's program for arguments like these, not yet compiled."""
        return self._function.lower(*arguments)

    def close(self) -> None:
        """Drops what has not been begun; what is being compiled ends by itself. More may be prepared later."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            self._programs = {key: future for key, future in self._programs.items() if not future.cancelled()}


def abstract_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and placement of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _key(arguments: Any) -> Any:
    leaves, treedef = jax.tree.flatten(arguments)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
