"""Checkpoints of a run, with Orbax: kept by count and by best metric, restored bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrft.config import ConfigError
from jaxrft.training import disk, event_loops


class CheckpointError(ConfigError):
    """No checkpoint can be read; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint held: the step it was made at, the arrays, and the trainer's own record."""

    step: int
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made when the first is saved.
        limit: newest ones kept.
        best_metric: key of the metrics by which one more, the best, is kept.
        greater_is_better: whether a larger value of it is better.
        warn: called with a line for the user when a checkpoint is passed over.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int,
        best_metric: str | None = None,
        greater_is_better: bool = True,
        warn: Callable[[str], None] = print,
    ):
        # Orbax logs tracebacks of errors that it also raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder.absolute()
        self._warn = warn
        keep: list[Any] = [policies.LatestN(limit)]
        best_fn = None
        if best_metric is not None:
            worst = float("-inf") if greater_is_better else float("inf")

            def best_fn(metrics: Mapping[str, float]) -> float:
                value = metrics.get(best_metric)
                return worst if value is None else float(value)

            keep.append(
                policies.BestN(
                    get_metric_fn=best_fn, reverse=not greater_is_better, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=best_fn,
                best_mode="max" if greater_is_better else "min",
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: Any, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Saves in the background; errors of an earlier save are raised here or by :meth:`wait`."""
        with disk.explained(self.folder):
            self._manager.check_for_errors()
            if step in self._manager.all_steps():
                return
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flat(state)), record=ocp.args.JsonSave(dict(record))
                ),
                metrics=dict(metrics) or None,
                force=True,
            )

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            DiskFullError: there was no room for it.
        """
        with disk.explained(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that can be read; None where there is none at all.

        A damaged one is passed over with a warning, and the one before it is used.

        Args:
            like: a state of the same structure, which may be abstract; restored arrays take its shapes, types and
                placement.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                with event_loops.drained():
                    return self._restore(step, like)
            except Exception as error:
                self._warn(
                    f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}); trying the one before"
                )
        if steps:
            raise CheckpointError(
                f"resume_from_checkpoint: none of the checkpoints in {self.folder} can be read; "
                "start again with another output_dir"
            )
        return None

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints later than ``step``: damaged ones that stand in the way of new ones."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def _restore(self, step: int, like: Any) -> Restored:
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _flat(like))
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
        leaves = [found.state[name] for name in _flat(like)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Restored(step=step, state=state, record=found.record)

    def close(self) -> None:
        """Ends the background work. Errors of it were raised by :meth:`save` or :meth:`wait`."""
        with contextlib.suppress(Exception):
            self._manager.close()


def _flat(state: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by the names of their paths: a checkpoint does not depend on the classes in it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
