"""One rollout and the updates made on it: the body of a run's loop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrft.config import ConfigError
from jaxrft.tracking.timing import peak_memory_bytes
from jaxrft.training import metrics as measures
from jaxrft.training.audit import Audit
from jaxrft.training.batch import Sample, in_list_order
from jaxrft.training.drawing import Drawn, draw
from jaxrft.training.rollouts import (
    RolloutBatch,
    greedy,
    lack_logprobs,
    make_samples,
    shuffled,
    training_sampling,
)

if TYPE_CHECKING:
    from jaxrft.training.loop import TrainingRun


class Cycle:
    """Rolls out, trains and reports, again and again.

    Args:
        run: whose record says where it stands, and whose parts do the work.
    """

    def __init__(self, run: TrainingRun):
        self._run, self.trainer, self.config, self.learner = run, run.trainer, run.config, run.learner
        self._unaudited = self.config.audit.enabled

    def run(self) -> None:
        """One rollout and the updates made on it."""
        number = self._run.record["rollouts"]
        drawn = self._draw()
        baseline = self._greedy(drawn)
        self._run.interrupts.check()
        shared = measures.reward_metrics(drawn.rollout) | measures.length_metrics(drawn.rollout)
        shared |= drawn.metrics(self.trainer.recipe.filter)
        if baseline is not None:
            shared["greedy_reward"] = measures.nanmean(baseline.scores.total)
            shared["rewards/errors"] += baseline.scores.errors
        left = self.trainer.total_steps - self.learner.step
        with self._run.phases("training", min(left, self.config.updates_per_rollout), interruptible=False) as progress:
            self.trainer.take_back()
            updates, advantages, tokens = self._train(number, drawn, baseline, left, progress)
            self.trainer.hand_over()
        self._run.check_parity(woken=self.trainer.engine.sleeps)
        self._run.record["rollouts"] = number + 1
        self._run.record["prompts"] += drawn.prompts
        self._run.record["num_tokens"] += tokens
        generated = sum(int(r.lengths.sum()) for r in (drawn.rollout, baseline) if r is not None)
        shared |= self._spent(generated, tokens, len(updates))
        self._run.report.updates(self.learner.step, shared, updates)
        self._run.report.completions(self.learner.step, drawn, advantages)

    def _draw(self) -> Drawn:
        """Generates the next rollout, from where the stream of prompts stands."""
        sampling = training_sampling(self.config)

        def collect(start: int, count: int) -> RolloutBatch:
            prompts = [self._run.prompts.prompts[i] for i in self._run.order.take(start, count)]
            group = self.config.num_generations
            return self.trainer.collector.collect(prompts, group, sampling, start, self._run.phases)

        drawn = draw(collect, self._run.record["prompts"], self.config.rollout_prompts, self.trainer.recipe.filter)
        if drawn.dropped[drawn.groups].all():
            self._run.tracker.console.warn(
                f"none of {drawn.prompts} groups passed the filter of {self.config.algorithm.recipe}: nothing is learnt"
            )
        return drawn

    def _greedy(self, drawn: Drawn) -> RolloutBatch | None:
        """A greedy completion of each prompt that is trained on, where the recipe compares with it."""
        if self.trainer.recipe.advantage.baseline != "greedy":
            return None
        prompts = [drawn.rollout.prompts[group] for group in drawn.groups]
        return self.trainer.collector.collect(prompts, 1, greedy(training_sampling(self.config)), 0, self._run.phases)

    def _train(
        self, number: int, drawn: Drawn, baseline: RolloutBatch | None, left: int, progress: Any
    ) -> tuple[list[dict[str, float]], np.ndarray, int]:
        """All updates made on a rollout.

        Returns:
            Statistics of each update, the advantage of each sample generated, and the tokens trained on.
        """
        recipe, several = self.trainer.recipe, self.config.updates_per_rollout > 1
        rollout = drawn.rollout.select(drawn.groups)
        samples = make_samples(rollout, self.config.mask_truncated_completions, drawn.dropped[drawn.groups])
        # Where nothing is trained there is nothing to compare: the audit waits.
        due = self._unaudited and any(s.trained for s in samples)
        dtype = np.dtype(self.trainer.model.dtype).name
        audit = Audit(self.config.audit, dtype, self.config.rollout.quantization) if due else None
        first = None if self._run.record["audited"] else audit
        order = list(range(len(samples)))
        if several:
            block = self.config.num_generations if recipe.policy.grouped else 1
            order = shuffled(len(samples), self.config.seed, number, block)
        kl_in_reward = recipe.kl.kl_in_reward and self.learner.needs_reference
        missing = self._lacks_logprobs(rollout)
        score_old = several or first is not None or kl_in_reward or missing
        ordered, rows = [samples[i] for i in order], None
        if score_old or audit is not None or self.learner.needs_reference:
            # Compiled while the samples are scored.
            rows = self.learner.compile_step(ordered)
        if audit is not None:
            self._audit(audit, rollout, samples)
        batch = self.learner.prepare(ordered, score_old=score_old, rows=rows)
        if missing:
            batch = dataclasses.replace(batch, sampler_logprobs=batch.old_logprobs * batch.mask)
        batch, kl = self._run.credit.assign(batch, drawn, baseline, order)
        updates = []
        for update in self.learner.update(batch, left, first, self._run.credit.kl_coef):
            updates.append(self._with_kl(update, kl))
            progress(len(updates))
        if audit is not None:
            self._unaudited, self._run.record["audited"] = False, True
        if self.learner.needs_reference:
            observed = measures.nanmean(np.array([u["kl"] for u in updates]))
            self._run.credit.adapt(observed, sum(s.trained for s in samples))
        advantages = np.zeros(len(drawn.rollout.texts), np.float32)
        advantages[np.asarray(drawn.samples)[order]] = measures.mean_advantages(batch)
        return updates, advantages, sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)

    def _lacks_logprobs(self, rollout: RolloutBatch) -> bool:
        """Whether the trainer's log-probabilities stand in for the engine's.

        Raises:
            ConfigError: they would have to, which the config does not allow.
        """
        lacks = lack_logprobs(rollout.completions)
        if lacks and self.config.rollout.missing_logprobs == "stop":
            raise ConfigError(
                "rollout.missing_logprobs: the engine does not know log-probabilities without truncation; sample "
                "without it, or set rollout.missing_logprobs=trainer"
            )
        return lacks

    def _with_kl(self, update: dict[str, float], in_reward: Any) -> dict[str, float]:
        """An update's statistics with the KL of the rewards and its weight, where there is one."""
        if not self.learner.needs_reference:
            return update
        kl = {"kl": float(in_reward)} if self.trainer.recipe.kl.kl_in_reward else {}
        return update | kl | {"kl_coef": float(self._run.credit.kl_coef)}

    def _audit(self, audit: Audit, rollout: RolloutBatch, samples: list[Sample]) -> None:
        audit.check_texts(
            self.trainer.tokenizer,
            [rollout.prompt_of(i) for i in range(len(samples))],
            rollout.completions,
            rollout.texts,
        )
        batch = self.learner.prepare(samples, score_old=True)
        flat = {name: in_list_order(batch, getattr(batch, name)) for name in ("old_logprobs", "mask")}
        trained = [s.trained and c.logprobs is not None for s, c in zip(samples, rollout.completions)]
        gap = audit.check_engine(rollout.completions, flat["old_logprobs"], flat["mask"], trained)
        if self.learner.needs_reference and self.learner.step == 0:
            assert batch.ref_logprobs is not None
            reference = in_list_order(batch, batch.ref_logprobs)
            audit.check_reference(reference, flat["old_logprobs"], flat["mask"])
        self._run.tracker.message(f"audit passed: engine and trainer differ by {gap:.1e} nats ({audit.word})")

    def _spent(self, generated: int, tokens: int, updates: int) -> dict[str, float]:
        """Time, tokens, compilations and memory of one rollout and its updates."""
        seconds = self._run.timer.take()
        speed = measures.throughput(seconds, generated, tokens * self.config.num_iterations)
        # Each optimizer step of a rollout takes its share, so that records add up.
        shares = {name: value / updates for name, value in (seconds | self._run.compiles.take()).items()}
        return (
            speed
            | shares
            | {
                "epoch": self._run.record["prompts"] / self._run.order.count,
                "num_tokens": self._run.record["num_tokens"],
                "peak_memory_bytes": peak_memory_bytes(),
            }
            | measures.transfer_metrics(self.trainer.engine.last_transfer)
        )
