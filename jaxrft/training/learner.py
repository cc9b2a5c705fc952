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
from jaxrft.parallel import batch_sharding, replicated
from jaxrft.training.audit import Audit
from jaxrft.training.batch import Sample, TrainBatch, longest_bucket, make_batch, pack_batch, select_step
from jaxrft.training.optimizer import adamw, schedule
from jaxrft.training.step import init_state, make_score, make_train_step

UNBOUNDED = np.full((2,), np.inf, np.float32)


class Learner:
    """Owns the train state and changes it.

    Args:
        config: of the run.
        recipe: the algorithm.
        model: whose parameters are trained. Its arrays are donated to the first step; ``publish`` gives it new ones.
        mesh: where everything lies.
        total_steps: optimizer steps of the whole run, for the learning rate's schedule.
    """

    def __init__(self, config: RLConfig, recipe: alg.Recipe, model: nnx.Module, mesh: Any, total_steps: int):
        self.config, self.recipe, self.model, self.mesh = config, recipe, model, mesh
        self.graphdef, params = nnx.split(model)
        self.optimizer = adamw(config)
        self.reset(params)
        self.reference: Any = None
        self._score = make_score(self.graphdef)
        # A KL in the rewards is in the advantages already.
        objective = dataclasses.replace(recipe.policy, kl_coef=0.0) if recipe.kl.kl_in_reward else recipe.policy
        self._step = make_train_step(
            self.graphdef,
            self.optimizer,
            schedule(config, total_steps),
            objective,
            config.max_grad_norm,
            num_groups=config.rollout_prompts,
            seed=config.seed,
        )

    def reset(self, params: Any) -> None:
        """Starts anew from ``params``, with an optimizer that has seen nothing."""
        params = jax.device_put(params, replicated(self.mesh))
        self.state = jax.device_put(init_state(params, self.optimizer), replicated(self.mesh))

    @property
    def step(self) -> int:
        """Optimizer steps made, skipped ones included."""
        return int(self.state.step)

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL to a reference, in the loss or in the rewards."""
        return self.recipe.policy.kl_coef > 0

    def keep_reference(self) -> None:
        """Copies the present parameters as the frozen reference: the originals are donated to the next step."""
        self.reference = jax.tree.map(jnp.copy, self.state.params)

    def publish(self) -> None:
        """Hands the present arrays to the module: those it held were donated."""
        nnx.update(self.model, self.state.params)

    def prepare(self, samples: Sequence[Sample], *, score_old: bool) -> TrainBatch:
        """Samples on the devices, with the reference's log-probabilities, and the policy's where asked for."""
        batch = self._place(self._batch(samples))
        if score_old:
            old = self._score(self.state.params, batch)
            batch = dataclasses.replace(batch, old_logprobs=old, use_old=jnp.ones_like(batch.use_old))
        if self.needs_reference:
            batch = dataclasses.replace(batch, ref_logprobs=self._score(self.reference, batch))
        return batch

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
        steps = self.config.micro_batches // self.config.gradient_accumulation_steps
        for number in range(min(steps * self.config.num_iterations, limit)):
            bounds = audit.ratio_bounds if audit and number == 0 else UNBOUNDED
            part = batch if steps == 1 else select_step(batch, number % steps, steps)
            self.state, stats = self._step(self.state, part, bounds, weight)
            values = {name: float(value) for name, value in jax.device_get(stats).items()}
            if audit and number == 0:
                audit.check_ratio(values["ratio/deviation_mean"], values["ratio/deviation_max"])
            yield values

    def _batch(self, samples: Sequence[Sample]) -> TrainBatch:
        """Padded or packed, as the config says; on the host."""
        config, devices = self.config, self.config.parallel.data_devices
        temperatures: dict[str, Any] = {
            "temperature": config.temperature,
            "first_token_temperature": config.rollout.first_token_temperature,
        }
        micro = config.per_device_train_batch_size * devices
        if not config.batching.pack:
            return make_batch(samples, micro, **temperatures)
        longest = longest_bucket(samples)
        time = config.batching.row_length or longest
        tokens = config.batching.tokens_per_device or config.per_device_train_batch_size * longest
        steps = len(samples) // (micro * config.gradient_accumulation_steps)
        rows = max(1, tokens // time) * devices
        return pack_batch(samples, rows, time, steps=steps, devices=devices, **temperatures)

    def _place(self, batch: TrainBatch) -> TrainBatch:
        rows = batch_sharding(self.mesh, axis=1)
        whole = replicated(self.mesh)
        return jax.tree.map(lambda a: jax.device_put(a, rows if a.ndim > 1 else whole), batch)
