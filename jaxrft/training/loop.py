"""One run of training, from the first rollout or from a checkpoint to the exported model."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jaxrft.config import ConfigError, parse
from jaxrft.tracking import Tracker
from jaxrft.tracking.timing import CompileCounter, PhaseTimer
from jaxrft.training import disk, summary
from jaxrft.training import metrics as measures
from jaxrft.training.checkpoint import Checkpoints
from jaxrft.training.credit import Credit
from jaxrft.training.cycle import Cycle
from jaxrft.training.interrupts import Interrupted, Interrupts
from jaxrft.training.phases import Phases
from jaxrft.training.reference import keep_reference, load_reference
from jaxrft.training.report import Reporter
from jaxrft.training.rollouts import RolloutBatch
from jaxrft.training.warm_start import SupervisedStage
from jaxrft.training.watchdog import Watchdog

if TYPE_CHECKING:
    from jaxrft.training.trainer import RLTrainer


class TrainingRun:
    """Everything that lives as long as a run does; used in a ``with`` statement.

    Args:
        trainer: whose parts do the work.
    """

    def __init__(self, trainer: RLTrainer):
        self.trainer, self.config = trainer, trainer.config
        self.learner, self.folder = trainer.learner, trainer.folder
        if trainer.train_prompts is None or trainer.order is None:
            raise ConfigError("data.train: got None; name the training prompts, or give train_dataset=...")
        self.prompts, self.order = trainer.train_prompts, trainer.order
        self.changes = self._changes() if self.config.resume_from_checkpoint else []
        self.resumed = self.folder.claim(self.config.resume_from_checkpoint, parse.to_yaml(self.config))
        # Where the run stands: rollouts done, prompts drawn, tokens trained on, whether an update was audited, and the
        # step of the last evaluation.
        self.record: dict[str, Any] = {
            "rollouts": 0, "prompts": 0, "num_tokens": 0, "audited": False, "evaluated": None
        }  # fmt: skip
        self.credit = Credit(trainer.recipe, trainer.rewards.weights, self.config.max_completion_length)
        self._stack = contextlib.ExitStack()
        self._answers: RolloutBatch | None = None
        self._compared: set[bool] = set()

    # ------------------------------------------------------------------ opening and closing

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.checkpoints = Checkpoints(
                self.folder.checkpoints,
                limit=self.config.save_total_limit,
                best_metric=self.config.metric_for_best_model,
                greater_is_better=self.config.greater_is_better,
            )
            stack.callback(self.checkpoints.close)
            self._restore()
            self.tracker = stack.enter_context(self._make_tracker())
            window = self.record.pop("window", None)
            self.report = Reporter(self.config, self.tracker, self.trainer.total_steps, window)
            self.interrupts = stack.enter_context(Interrupts())
            self.timer, self.compiles = PhaseTimer(), CompileCounter()
            watchdog = Watchdog(self.config.watchdog, self.folder.path)
            self.phases = Phases(self.tracker.console, self.timer, watchdog, self.interrupts.check)
            self.cycle = Cycle(self)
            stack.callback(self.learner.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "completed" if kind is None else "interrupted" if kind is Interrupted else "failed"
        self.tracker.close(status)
        self._stack.close()

    def _make_tracker(self) -> Tracker:
        return Tracker(
            self.folder.path,
            run_name=self.config.run_name or self.folder.path.name,
            report_to=self.config.report_to,
            tracking=self.config.tracking,
            config=parse.to_dict(self.config),
            total_steps=self.trainer.total_steps,
            resumed_step=self.learner.step if self.started else None,
        )

    def _changes(self) -> list[str]:
        """What the config of the run that is continued said otherwise."""
        if not self.folder.config.exists():
            return []
        now = parse.to_dict(self.config) | {"resume_from_checkpoint": False}
        before = parse.load_yaml(self.folder.config) | {"resume_from_checkpoint": False}
        return parse.changes(before, now)

    @property
    def started(self) -> bool:
        """Whether RL has begun: this is false until a warm start is through."""
        return bool(self.record.get("started"))

    # ------------------------------------------------------------------ the run

    def execute(self) -> dict[str, float]:
        """Runs to the end, saved on the way.

        Raises:
            Interrupted: a signal came; what was done is saved.
        """
        summary.announce(self.tracker, self.trainer, self.learner.step if self.started else None)
        for change in self.changes:
            self.tracker.console.warn(f"the config of this run has changed: {change}")
        try:
            with disk.explained(self.folder.path):
                return self._execute()
        except Interrupted:
            if self.started:
                self._save()
                self.checkpoints.wait()
                self.tracker.message(
                    f"saved at step {self.learner.step}; continue with output_dir={self.config.output_dir} "
                    "resume_from_checkpoint=true"
                )
            else:
                self.tracker.message("left before RL began: nothing to save; the run can be started anew the same way")
            raise

    def _execute(self) -> dict[str, float]:
        if not self.started:
            self._begin()
        elif self.learner.needs_reference:
            load_reference(self.learner, self.folder)
        self.trainer.hand_over()
        self.check_parity()
        self.learner.compile_ahead()
        while self.learner.step < self.trainer.total_steps:
            self._boundary()
            self.cycle.run()
        return self._finish()

    def _begin(self) -> None:
        """All that comes before the first rollout: warm start and reference."""
        if self.config.warm_start.max_steps:
            self._warm_start()
        if self.learner.needs_reference:
            keep_reference(self.learner, self.folder)
        self.record["started"] = True

    def check_parity(self, woken: bool = False) -> None:
        """Compares engine and trainer on fixed prompts, where that is due.

        Args:
            woken: whether weights have come to an engine that had let go of its memory: another way than the first.

        Raises:
            ParityError: they differ.
        """
        wanted = self.config.rollout.parity
        if self.trainer.engine.keeps_params or wanted == "never" or (wanted == "first" and woken in self._compared):
            return
        gap = self.trainer.check_parity()
        if woken not in self._compared:
            self.tracker.message(f"parity: engine and trainer agree within {gap:.1e} nats on fixed prompts")
        self._compared.add(woken)

    def _boundary(self) -> None:
        """Between two rollouts: the place where a run is whole, can be evaluated, saved and left."""
        step = self.learner.step
        due = self.config.eval_on_start if step == 0 else self._due(self.config.eval_steps)
        if due and self.trainer.eval_prompts is not None and self.record["evaluated"] != step:
            self._evaluate()
        if self.config.save_steps is not None and (step == 0 or self._due(self.config.save_steps)):
            self._save()
        self.interrupts.check()

    def _due(self, every: int | None) -> bool:
        """Whether one of the steps since the last boundary was a multiple of ``every``."""
        step, made = self.learner.step, self.config.updates_per_rollout
        return every is not None and step // every > max(step - made, 0) // every

    # ------------------------------------------------------------------ evaluation, checkpoints, end

    def _evaluate(self) -> None:
        self._answers = self.trainer.answer_held_out(self.phases)
        metrics = measures.evaluation_metrics(self._answers) | self.timer.take() | self.compiles.take()
        self.record["evaluated"] = self.learner.step
        self.report.log(self.learner.step, metrics)
        if self.config.metric_for_best_model is not None:
            self._save()

    def _save(self) -> None:
        step = self.learner.step
        with self.phases("checkpoint"):
            record = self.record | {"window": self.report.state(), "credit": self.credit.state()}
            self.checkpoints.save(step, self.learner.state, record, self.report.measured_at(step))

    def _finish(self) -> dict[str, float]:
        if self.trainer.eval_prompts is not None and self.record["evaluated"] != self.learner.step:
            self._evaluate()
        self._save()
        with self.phases("checkpoint"):
            self.checkpoints.wait()
            self.trainer.save_model()
        summary.show(self.tracker, self.folder, self._answers)
        return self.report.last

    def _restore(self) -> None:
        if not self.resumed:
            return
        restored = self.learner.restore(self.checkpoints)
        if restored is None:
            print(f"{self.folder.path} has no checkpoint yet: the run starts from its beginning")
            return
        self.checkpoints.forget_after(restored.step)
        # Runs of version 0.1.0 kept neither of these, and drew the same number of prompts for each rollout.
        drawn = restored.record["rollouts"] * self.config.rollout_prompts
        self.record |= {"prompts": drawn} | restored.record
        if (credit := self.record.pop("credit", None)) is not None:
            self.credit.load(credit)

    def _warm_start(self) -> None:
        """The supervised stage; interrupted, it starts anew."""
        SupervisedStage(self.trainer, self.phases, self.tracker, self.interrupts.check).run()
        self.timer.take()
