"""One run of training, from the first rollout or from a checkpoint to the exported model."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from jaxrft.config import ConfigError, parse
from jaxrft.tracking import Tracker
from jaxrft.tracking.timing import CompileCounter, PhaseTimer, peak_memory_bytes
from jaxrft.training import disk, summary
from jaxrft.training import metrics as measures
from jaxrft.training.audit import Audit
from jaxrft.training.checkpoint import Checkpoints
from jaxrft.training.interrupts import Interrupted, Interrupts
from jaxrft.training.phases import Phases
from jaxrft.training.rollouts import RolloutBatch, make_samples, shuffled, training_sampling
from jaxrft.training.warm_start import SupervisedStage
from jaxrft.training.watchdog import Watchdog
from jaxrft.training.window import MetricWindow

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
        # Where the run stands: rollouts done, tokens trained on, and the step of the last evaluation.
        self.record: dict[str, Any] = {"rollouts": 0, "num_tokens": 0, "evaluated": None}
        self.last_metrics: dict[str, float] = {}
        # What was measured at the present step, for choosing the best checkpoint.
        self._present: tuple[int, dict[str, float]] = (-1, {})
        self._stack = contextlib.ExitStack()
        self._unaudited = self.config.audit.enabled
        self._window = MetricWindow()
        self._answers: RolloutBatch | None = None

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
            self.interrupts = stack.enter_context(Interrupts())
            self.timer, self.compiles = PhaseTimer(), CompileCounter()
            watchdog = Watchdog(self.config.watchdog, self.folder.path)
            self.phases = Phases(self.tracker.console, self.timer, watchdog, self.interrupts.check)
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
            self._load_reference()
        self.trainer.hand_over()
        while self.learner.step < self.trainer.total_steps:
            self._boundary()
            self._iterate()
        return self._finish()

    def _begin(self) -> None:
        """All that comes before the first rollout: warm start and reference."""
        if self.config.warm_start.max_steps:
            self._warm_start()
        if self.learner.needs_reference:
            self.learner.keep_reference()
            store = self._reference_store()
            store.save(0, self.learner.reference, {}, {})
            store.wait()
        self.record["started"] = True

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

    def _iterate(self) -> None:
        """One rollout and the updates made on it."""
        number = self.record["rollouts"]
        rollout = self._roll_out(number)
        self.interrupts.check()
        samples = make_samples(rollout, self.config.mask_truncated_completions)
        tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)
        audit = Audit(self.config.audit, np.dtype(self.trainer.model.dtype).name) if self._unaudited else None
        fresh_audit = audit if number == 0 else None
        several = self.config.updates_per_rollout > 1
        shared = measures.reward_metrics(rollout) | measures.length_metrics(rollout)
        left = self.trainer.total_steps - self.learner.step
        with self.phases("training", min(left, self.config.updates_per_rollout), interruptible=False) as progress:
            if audit is not None:
                self._audit(audit, rollout, samples)
            if several:
                samples = shuffled(samples, self.config.seed, number)
            batch = self.learner.prepare(samples, score_old=several or fresh_audit is not None)
            updates = []
            for update in self.learner.update(batch, left, fresh_audit):
                updates.append(update)
                progress(len(updates))
            self.trainer.hand_over()
        self._unaudited = False
        self.record["rollouts"] = number + 1
        self.record["num_tokens"] += tokens
        self._report(rollout, shared, updates, tokens)

    def _roll_out(self, number: int) -> RolloutBatch:
        prompts = [self.prompts.prompts[i] for i in self.order.indices(number)]
        return self.trainer.collector.collect(
            prompts,
            self.config.num_generations,
            training_sampling(self.config),
            number * len(prompts),
            self.phases,
            self.trainer.recipe.advantage,
        )

    def _audit(self, audit: Audit, rollout: RolloutBatch, samples: list[Any]) -> None:
        audit.check_texts(
            self.trainer.tokenizer,
            [rollout.prompt_of(i) for i in range(len(samples))],
            rollout.completions,
            rollout.texts,
        )
        batch = self.learner.prepare(samples, score_old=True)
        flat = {name: np.asarray(getattr(batch, name)).reshape(len(samples), -1) for name in ("old_logprobs", "mask")}
        trained = [s.trained for s in samples]
        gap = audit.check_engine(rollout.completions, flat["old_logprobs"], flat["mask"], trained)
        if self.learner.needs_reference and self.learner.step == 0:
            reference = np.asarray(batch.ref_logprobs).reshape(len(samples), -1)
            audit.check_reference(reference, flat["old_logprobs"], flat["mask"])
        self.tracker.message(f"audit passed: engine and trainer agree within {gap:.1e} nats")

    # ------------------------------------------------------------------ reports, evaluation, checkpoints

    def _report(
        self, rollout: RolloutBatch, shared: dict[str, float], updates: list[dict[str, float]], tokens: int
    ) -> None:
        seconds = self.timer.take()
        shared |= measures.throughput(seconds, int(rollout.lengths.sum()), tokens * self.config.num_iterations)
        # Each optimizer step of a rollout takes its share, so that records add up.
        spent = seconds | self.compiles.take()
        shared |= {name: value / len(updates) for name, value in spent.items()}
        shared |= {
            "epoch": self.order.epoch(self.record["rollouts"]),
            "num_tokens": self.record["num_tokens"],
            "peak_memory_bytes": peak_memory_bytes(),
        }
        first = self.learner.step - len(updates)
        for number, update in enumerate(updates, start=first + 1):
            self._window.add(shared | update)
            if number % self.config.logging_steps == 0 or number == self.trainer.total_steps:
                self._log(number, self._window.take())
        if self.config.log_completions:
            self.tracker.log_completions(self.learner.step, measures.completion_rows(rollout))
        if self.config.num_completions_to_print:
            self._print_completions(rollout)

    def _print_completions(self, rollout: RolloutBatch) -> None:
        rows = measures.completion_rows(rollout)[: self.config.num_completions_to_print]
        self.tracker.console.table(
            f"Completions of step {self.learner.step}",
            ["prompt", "completion", "reward"],
            [[str(r["prompt"]), str(r["completion"]), str(r["reward"])] for r in rows],
        )

    def _evaluate(self) -> None:
        self._answers = self.trainer.answer_held_out(self.phases)
        metrics = measures.evaluation_metrics(self._answers) | self.timer.take() | self.compiles.take()
        self.record["evaluated"] = self.learner.step
        self._log(self.learner.step, metrics)
        if self.config.metric_for_best_model is not None:
            self._save()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.log(step, metrics)
        self.last_metrics |= metrics
        at, known = self._present
        self._present = (step, (known if at == step else {}) | metrics)

    def _save(self) -> None:
        at, known = self._present
        numbers = {k: v for k, v in known.items() if np.isfinite(v)} if at == self.learner.step else {}
        with self.phases("checkpoint"):
            record = self.record | {"window": self._window.state()}
            self.checkpoints.save(self.learner.step, self.learner.state, record, numbers)

    def _finish(self) -> dict[str, float]:
        if self.trainer.eval_prompts is not None and self.record["evaluated"] != self.learner.step:
            self._evaluate()
        self._save()
        with self.phases("checkpoint"):
            self.checkpoints.wait()
            self.trainer.save_model()
        summary.show(self.tracker, self.folder, self._answers)
        return self.last_metrics

    def _restore(self) -> None:
        if not self.resumed:
            return
        restored = self.checkpoints.restore(self.learner.state)
        if restored is None:
            print(f"{self.folder.path} has no checkpoint yet: the run starts from its beginning")
            return
        self.checkpoints.forget_after(restored.step)
        self.learner.state = restored.state
        self.record = restored.record
        self._window = MetricWindow(self.record.pop("window"))

    def _reference_store(self) -> Checkpoints:
        return self._stack.enter_context(contextlib.closing(Checkpoints(self.folder.reference, limit=1)))

    def _load_reference(self) -> None:
        restored = self._reference_store().restore(self.learner.state.params)
        if restored is None:
            raise ConfigError(
                f"beta: {self.folder.reference} holds no reference model; a run that began without a KL cannot gain one"
            )
        self.learner.reference = restored.state

    def _warm_start(self) -> None:
        """The supervised stage; interrupted, it starts anew."""
        SupervisedStage(self.trainer, self.phases, self.tracker, self.interrupts.check).run()
        self.timer.take()
