"""Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxrft.config import ConfigError, TrackingConfig
from jaxrft.tracking.loggers import Metrics, numbers

RUN_FILE = "wandb_run.json"


class WandB:
    """Sends metrics to Weights & Biases, or keeps them in ``<folder>/wandb`` for ``wandb sync``.

    A resumed run goes on under the same run id, and does not send again the steps that were sent before the
    interruption. Both are kept in ``wandb_run.json``.

    Raises:
        ConfigError: the library is missing, or online has no API key or no server.
    """

    name = "wandb"

    def __init__(
        self,
        folder: Path,
        *,
        run_name: str,
        tracking: TrackingConfig,
        config: dict[str, Any],
        resumed_step: int | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "report_to: got wandb, which is not installed; run: pip install 'jaxrft[wandb]', "
                "or remove wandb from report_to"
            ) from error
        self._file = folder / RUN_FILE
        earlier = json.loads(self._file.read_text()) if resumed_step is not None and self._file.exists() else {}
        self._earlier: dict[str, int] = earlier.get("sent", {})
        self._sent = dict(self._earlier)
        self._run = _start(
            wandb,
            project=tracking.wandb_project,
            name=run_name,
            id=earlier.get("id"),
            resume="allow" if earlier else None,
            mode=tracking.wandb_mode,
            dir=str(folder),
            config=config,
        )
        self._axes: set[str] = set()
        self._remember()

    @property
    def where(self) -> str:
        """Address of the run, or the command that sends it later."""
        return f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else str(self._run.url)

    def log(self, step: int, metrics: Metrics) -> None:
        """Logs numbers over the step of their stage; those of a stage other than RL as ``<stage>/<name>``."""
        stage = str(metrics.get("stage", ""))
        prefix = f"{stage}/" if stage else ""
        named = {prefix + name: value for name, value in numbers(metrics).items()}
        # A run that resumes from step n takes later steps again, of which some were sent before the interruption.
        new = {name: value for name, value in named.items() if step > self._earlier.get(name, -1)}
        if not new:
            return
        self._declare_axis(prefix)
        self._run.log({f"{prefix}step": step, **new})
        self._sent.update(dict.fromkeys(new, step))
        self._remember()

    def close(self, status: str) -> None:
        """Finishes the run; it counts as failed unless it was completed or interrupted."""
        self._run.finish(exit_code=1 if status == "failed" else 0)

    def _declare_axis(self, prefix: str) -> None:
        # W&B's own step may only rise, over all stages and resumptions; metrics over an axis of ours need not.
        if prefix not in self._axes:
            self._run.define_metric(f"{prefix}step", hidden=True)
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            self._axes.add(prefix)

    def _remember(self) -> None:
        replacement = self._file.with_name(RUN_FILE + ".part")
        replacement.write_text(json.dumps({"id": self._run.id, "sent": self._sent}) + "\n")
        replacement.replace(self._file)


def _start(wandb: Any, *, mode: str, **arguments: Any) -> Any:
    """``wandb.init`` without a question on the terminal, its errors as one line."""
    remedy = "set tracking.wandb_mode=offline to keep the run in its folder"
    settings = wandb.Settings(silent=True, console="off")
    try:
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError(f"report_to: wandb has no API key; run `wandb login` or set WANDB_API_KEY, or {remedy}")
        return wandb.init(mode=mode, settings=settings, **arguments)
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"report_to: wandb could not start ({reason}); {remedy}") from error
