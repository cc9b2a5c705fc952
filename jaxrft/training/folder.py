"""The folder of a run: what lies where, and who may write there."""

from __future__ import annotations

from pathlib import Path

from jaxrft.config import ConfigError


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.reference = self.path / "reference"
        self.final = self.path / "final"

    def check(self, resume: bool) -> bool:
        """Whether the folder holds a run.

        Raises:
            ConfigError: it does and ``resume`` is not set, or the other way round.
        """
        holds_run = self.config.exists()
        if holds_run and not resume:
            raise ConfigError(
                f"output_dir: {self.path} already holds a run; continue it with resume_from_checkpoint=true, "
                "or choose another output_dir"
            )
        if not holds_run and resume:
            raise ConfigError(
                f"resume_from_checkpoint: {self.path} holds no run (no config.yaml); "
                "set output_dir to the run's folder, or leave resume_from_checkpoint out to start one"
            )
        return holds_run

    def claim(self, resume: bool, resolved: str) -> bool:
        """Makes the folder, or takes it over to continue, and writes the resolved config.

        Args:
            resume: whether the run that the folder holds is to be continued.
            resolved: the config as YAML.

        Returns:
            Whether a run is continued.

        Raises:
            ConfigError: as :meth:`check`, or the folder cannot be written to.
        """
        continued = self.check(resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(resolved)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write to {self.path} ({error.strerror})") from error
        return continued
