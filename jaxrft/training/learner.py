"""The learning side of a run: parameters, optimizer, reference, and the updates made on samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrft import algorithms as alg
from jaxrft.config import RLConfig
from jaxrft.parallel import Layout
from jaxrft.parallel.host import to_device, to_host
from jaxrft.parallel.rules import SHARDING_AXES
from jaxrft.training.ahead import Ahead
from jaxrft.training.audit import Audit
from jaxrft.training.batch import (
    Sample,
    TrainBatch,
    batch_shardings,
    in_list_order,
    make_batch,
    pack_batch,
    select_step,
)
from jaxrft.training.checkpoint import Checkpoints, Restored
from jaxrft.training.filling import Limits
from jaxrft.training.optimizer import adamw, schedule
from jaxrft.training.state import Placement, delete, make_init
from jaxrft.training.step import make_score, make_train_step

UNBOUNDED = np.full((2,), np.inf, np.float32)


class Learner:
    """Owns the train state and changes it.

    Args:
        config: of the run.
        recipe: the algorithm.
        model: whose parameters are trained. Its arrays are donated to the first step; ``publish`` gives it new ones.
        layout: mesh and strategy.
        total_steps: optimizer steps of the whole run, for the learning rate's schedule.
    """

    def __init__(self, config: RLConfig, recipe: alg.Recipe, model: nnx.Module, layout: Layout, total_steps: int):
        self.config, self.recipe, self.model, self.layout = config, recipe, model, layout
        self.placement = Placement(layout, config.memory.offload_optimizer)
        self.graphdef, params = nnx.split(model)
        self.optimizer = adamw(config)
        self.first_loss_scale = (config.model.loss_scale or 65536.0) if config.model.dtype == "float16" else None
        self._init, like = make_init(params, self.optimizer, self.placement, self.first_loss_scale)
        self.reset(params)
        self.reference: Any = None
        self._score = Ahead(make_score(self.graphdef, layout))
        # A KL in the rewards is in the advantages already.
        objective = dataclasses.replace(recipe.policy, kl_coef=0.0) if recipe.kl.kl_in_reward else recipe.policy
        self._step = Ahead(
            make_train_step(
                self.graphdef,
                self.optimizer,
                schedule(config, total_steps),
                objective,
                config.max_grad_norm,
                placement=self.placement,
                like=like,
                growth_steps=config.model.loss_scale_steps or 2000,
                num_groups=config.rollout_prompts,
                seed=config.seed,
            )
        )

    def reset(self, params: Any) -> None:
        """Starts anew from ``params``, with an optimizer that has seen nothing."""
        self.state = self._init(params)

    def restore(self, checkpoints: Checkpoints) -> Restored | None:
        """Takes the state of the newest checkpoint that can be read; None, and the first state, where there is none.

        Two whole states of a large model do not fit where it is trained. So the moments go before those of the
        checkpoint come, and the parameters when these are there: they are held twice, where a step holds gradients.

        Raises:
            CheckpointError: there are checkpoints, and none can be read; the state is the first one.
        """
        params, restored = self.state.params, None
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)
        delete(self.state.opt_state)
        try:
            restored = checkpoints.restore(like)
        finally:
            if restored is None:
                self.reset(params)
        if restored is not None:
            self.state = restored.state
            self.publish()
            # The engine has them yet; it is given new ones before it is used.
            delete(params)
        return restored

    @property
    def step(self) -> int:
        """Optimizer steps made, skipped ones included."""
        return int(self.state.step)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that share out the samples of a rollout."""
        return self.config.micro_batches // self.config.gradient_accumulation_steps

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL to a reference, in the loss or in the rewards."""
        return self.recipe.policy.kl_coef > 0

    def keep_reference(self) -> None:
        """Copies the present parameters as the frozen reference: the originals are donated to the next step."""
        copy = jax.tree.map(jnp.copy, self.state.params)
        self.hold_reference(copy)

    def hold_reference(self, params: Any) -> None:
        """Takes ``params`` as the reference; they lie in the host's memory between uses where the config says so."""
        self.reference = to_host(params) if self.config.memory.offload_reference else params

    def publish(self) -> None:
        """Hands the present arrays to the module: those it held were donated."""
        nnx.update(self.model, self.state.params)

    @property
    def copies_for_rollout(self) -> bool:
        """Whether an engine needs a copy of the parameters: one that is not sharded for training."""
        return self.layout.shards("params") and any(self.layout.mesh.shape[name] > 1 for name in SHARDING_AXES)

    def for_rollout(self, params: Any) -> Any:
        """Parameters as an engine reads them at every token: whole but for tensor parallelism."""
        if not self.copies_for_rollout:
            return params
        whole = dataclasses.replace(self.layout, strategy="ddp")
        return jax.device_put(params, whole.shardings("params", params))

    @property
    def compiles_ahead(self) -> bool:
        """Whether programs are compiled before they are needed: where there is something to gain."""
        wanted = self.config.parallel.compile_ahead
        return jax.default_backend() != "cpu" if wanted is None else wanted

    def compile_ahead(self) -> None:
        """Starts to compile what an update takes whose samples are as long as they may be; returns at once.

        Nothing is where nothing is compiled ahead, nor where rows are packed: shapes depend on all lengths then.
        """
        config = self.config
        if not self.compiles_ahead or config.batching.pack:
            return
        logprobs = np.zeros(config.max_completion_length, np.float32)
        longest = Sample(prompt_ids=[0] * config.max_prompt_length, response_ids=[0] * len(logprobs), logprobs=logprobs)
        rows = make_rows(config, [longest] * config.rollout_samples)
        if config.audit.enabled or config.updates_per_rollout > 1 or self.needs_reference:
            self._score.prepare(self.state.params, _abstract(rows, batch_shardings(rows, self.layout)))
        self._compile_step(rows)

    def compile_step(self, samples: Sequence[Sample]) -> TrainBatch | None:
        """Starts to compile the step for these samples, where programs are compiled ahead; returns at once.

        Args:
            samples: in the order in which they are trained.

        Returns:
            Their rows, on the host, if they were made: :meth:`prepare` takes them.
        """
        if not self.compiles_ahead:
            return None
        rows = make_rows(self.config, samples)
        self._compile_step(rows)
        return rows

    def _compile_step(self, rows: TrainBatch) -> None:
        if self.needs_reference:
            rows = dataclasses.replace(rows, ref_logprobs=rows.old_logprobs)
        shardings = batch_shardings(rows, self.layout)
        part = rows if self.steps_per_rollout == 1 else select_step(rows, 0, self.steps_per_rollout)
        self._step.prepare(self.state, _abstract(part, shardings), UNBOUNDED, np.float32(0))

    def close(self) -> None:
        """Drops what has not been begun of what is compiled ahead."""
        self._step.close()
        self._score.close()

    def prepare(self, samples: Sequence[Sample], *, score_old: bool, rows: TrainBatch | None = None) -> TrainBatch:
        """Samples on the devices, with the reference's log-probabilities, and the policy's where asked for.

        Args:
            rows: what :meth:`compile_step` made of the same samples.
        """
        batch = self._place(make_rows(self.config, samples) if rows is None else rows)
        if score_old:
            old = self._score(self.state.params, batch)
            # From the host: one small program less for each length.
            use_old = jax.device_put(np.ones(batch.use_old.shape, bool), batch_shardings(batch, self.layout).use_old)
            batch = dataclasses.replace(batch, old_logprobs=old, use_old=use_old)
        if self.needs_reference:
            batch = dataclasses.replace(batch, ref_logprobs=self._score(to_device(self.reference), batch))
        return batch

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The present policy's log-probability of each response token, float32 [tokens] a sample."""
        filled = [*samples, *[samples[-1]] * (-len(samples) % self.config.parallel.data_devices)]
        batch = self._place(padded_rows(self.config, filled, len(filled)))
        rows = in_list_order(batch, self._score(self.state.params, batch))
        return [np.asarray(row[: len(sample.response_ids)]) for row, sample in zip(rows, samples)]

    def update(
        self, batch: TrainBatch, limit: int, audit: Audit | None, kl_coef: float | None = None
    ) -> Iterator[dict[str, float]]:
        """All optimizer steps of one rollout, at most ``limit``; yields each one's statistics.

        Args:
            batch: as ``prepare`` gave it.
            limit: steps that the run has left.
            audit: checks the first of these steps, which changes nothing when it fails.
            kl_coef: weight of the KL in the loss; None: the recipe's.
        """
        weight = np.float32(self.recipe.policy.kl_coef if kl_coef is None else kl_coef)
        steps = self.steps_per_rollout
        waiting: dict[str, Any] | None = None
        for number in range(min(steps * self.config.num_iterations, limit)):
            audited = audit if number == 0 else None
            bounds = UNBOUNDED if audited is None else audited.ratio_bounds
            part = batch if steps == 1 else select_step(batch, number % steps, steps)
            self.state, stats = self._step(self.state, part, bounds, weight)
            if audited is not None:
                values = _numbers(stats)
                audited.check_ratio(values["ratio/deviation_mean"], values["ratio/deviation_max"])
                yield values
                continue
            # The device goes on with this step while the host reads what the one before it came to.
            if waiting is not None:
                yield _numbers(waiting)
            waiting = stats
        if waiting is not None:
            yield _numbers(waiting)

    def _place(self, batch: TrainBatch) -> TrainBatch:
        return jax.device_put(batch, batch_shardings(batch, self.layout))


def _abstract(batch: TrainBatch, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), batch, shardings)


def _numbers(stats: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(stats).items()}


def make_rows(config: RLConfig, samples: Sequence[Sample]) -> TrainBatch:
    """Micro-batches, padded or packed as the config says; on the host."""
    devices, multiple = config.parallel.data_devices, config.parallel.sequence
    micro = config.per_device_train_batch_size * devices
    if not config.batching.pack:
        return padded_rows(config, samples, micro)
    longest = limits_of(config).fitting(samples, multiple)[0]
    time = config.batching.row_length or longest
    time += -time % multiple
    tokens = config.batching.tokens_per_device or config.per_device_train_batch_size * longest
    steps = len(samples) // (micro * config.gradient_accumulation_steps)
    rows = max(1, tokens // time) * devices
    return pack_batch(samples, rows, time, steps=steps, devices=devices, **_scoring(config))


def padded_rows(config: RLConfig, samples: Sequence[Sample], rows: int) -> TrainBatch:
    """Micro-batches of so many rows, each one sample; on the host."""
    return make_batch(samples, rows, multiple=config.parallel.sequence, **_scoring(config))


def limits_of(config: RLConfig) -> Limits:
    """The longest that a run's samples may be."""
    return Limits(config.max_prompt_length + config.max_completion_length, config.max_completion_length)


def _scoring(config: RLConfig) -> dict[str, Any]:
    """How log-probabilities are taken, and of what shapes."""
    return {
        "limits": limits_of(config),
        "temperature": config.temperature,
        "first_token_temperature": config.rollout.first_token_temperature,
        # Where the time axis is shared out, picking places along it would gather all hidden states.
        "pick": config.parallel.sequence == 1,
    }
