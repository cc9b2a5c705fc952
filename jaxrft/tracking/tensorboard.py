"""TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.tracking.loggers import Metrics, numbers


class TensorBoard:
    """Writes event files to ``<folder>/tensorboard``, those of a stage other than RL to a folder of its name there.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "report_to: got tensorboard, which needs tensorboardX; run: pip install 'jaxrft[tensorboard]', "
                "or remove tensorboard from report_to"
            ) from error
        self.folder = folder / "tensorboard"
        self._make = SummaryWriter
        # TensorBoard hides what an interrupted run wrote from this step on.
        purge_step = None if resumed_step is None else resumed_step + 1
        self._writers: dict[str, Any] = {"": SummaryWriter(str(self.folder), purge_step=purge_step)}

    @property
    def where(self) -> str:
        """The command that shows the run."""
        return f"tensorboard --logdir {self.folder}"

    def log(self, step: int, metrics: Metrics) -> None:
        """Writes each number as a scalar."""
        stage = str(metrics.get("stage", ""))
        if stage not in self._writers:
            self._writers[stage] = self._make(str(self.folder / stage))
        for name, value in numbers(metrics).items():
            self._writers[stage].add_scalar(name, value, step)
        self._writers[stage].flush()

    def close(self, status: str) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
