"""Our side of benchmarks/train_step.py: the trainer's own programs, compiled, on random samples."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import step_shapes
from flax import nnx
from step_config import Case, config_of

from jaxrft import models
from jaxrft.config import ConfigError, RLConfig
from jaxrft.parallel.description import GIB
from jaxrft.training.batch import TrainBatch, batch_shardings
from jaxrft.training.learner import UNBOUNDED, Learner, make_rows
from jaxrft.training.parts import build_layout, build_model, build_recipe
from jaxrft.training.plan import Plan, make_plan, usable_bytes
from jaxrft.training.step import make_score


class Ours:
    """A compiled program and what it runs on; it runs at each call.

    Attributes:
        config: of a run that would do the same.
        spec: of the model.
        plan: the trainer's memory plan; None where there is none for such a program.
        remat: policy, as planned.
        strategy: what is sharded.
        samples, batch: what it runs on.
        lower_seconds, compile_seconds: how long it took to make.

    Raises:
        ConfigError: the settings contradict each other, or a CPU has not the memory.
    """

    config: RLConfig
    spec: Any
    plan: Plan | None = None
    remat: str = "none"
    strategy: str
    batch: TrainBatch

    def __init__(self, case: Case, fields: dict[str, Any] | None = None):
        self.config = config_of(case)
        self.layout = build_layout(self.config)
        self.strategy = self.layout.strategy
        fields = fields or step_shapes.hf_config(case.model, case.length)
        self.spec = models.spec_from_config(fields)
        self.samples = step_shapes.make_samples(self.config.rollout_samples, case.length, self.spec.vocab_size)
        lower = self._prepare(case, fields)
        start = time.perf_counter()
        lowered = lower()
        self.lower_seconds = time.perf_counter() - start
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start - self.lower_seconds

    @property
    def valid_tokens(self) -> int:
        return sum(sample.length for sample in self.samples)

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        parts, rows, length = self.batch.tokens.shape
        used = parts if self.batch.used is None else int(np.sum(np.asarray(self.batch.used)))
        return used * rows * length

    @property
    def flops(self) -> float:
        return step_shapes.model_flops(self.spec, self.samples)

    def memory(self) -> dict[str, Any]:
        """Of each device, or of the one that holds most: what its allocator saw, else what the program takes."""
        analysis = self.program.memory_analysis()
        program = {
            "arguments_bytes": analysis.argument_size_in_bytes,
            "temporary_bytes": analysis.temp_size_in_bytes,
        }
        stats = [device.memory_stats() for device in self.layout.mesh.devices.flat]
        if jax.default_backend() == "cpu" or not all(stats):
            return {"peak_bytes": sum(program.values()), "source": "program: arguments + temporaries", **program}
        peak = max(found["peak_bytes_in_use"] for found in stats if found)
        return {"peak_bytes": peak, "source": "device: peak_bytes_in_use of the process", **program}

    def _make_model(self, case: Case, fields: dict[str, Any]) -> Any:
        options = {"dtype": case.dtype, "param_dtype": case.param_dtype, "layout": self.layout}
        model = models.from_config(fields, seed=self.config.seed, **options)
        return build_model(self.config, model, None, self.layout, self.remat)


class OurStep(Ours):
    """The trainer's jitted optimizer step."""

    def _prepare(self, case: Case, fields: dict[str, Any]) -> Any:
        self.plan = _plan(self.config, self.spec, self.layout)
        self.remat = self.plan.remat
        model = self._make_model(case, fields)
        self.learner = Learner(self.config, build_recipe(self.config), model, self.layout, total_steps=10**6)
        self.batch = self.learner.prepare(self.samples, score_old=False)
        self.kl_coef = np.float32(0.0)
        # Not Learner.update, which also brings the statistics to the host: the program alone, called as it calls it.
        return lambda: self.learner._step.lower(self.learner.state, self.batch, UNBOUNDED, self.kl_coef)

    def __call__(self) -> dict[str, jax.Array]:
        self.learner.state, stats = self.program(self.learner.state, self.batch, UNBOUNDED, self.kl_coef)
        jax.block_until_ready((self.learner.state, stats))
        return {"loss": stats["loss"], "grad_norm": stats["grad_norm"]}


class OurScoring(Ours):
    """The trainer's jitted forward pass: the log-probability of every response token."""

    def _prepare(self, case: Case, fields: dict[str, Any]) -> Any:
        graphdef, self.params = nnx.split(self._make_model(case, fields))
        batch = make_rows(self.config, self.samples)
        self.batch = jax.device_put(batch, batch_shardings(batch, self.layout))
        return lambda: make_score(graphdef, self.layout).lower(self.params, self.batch)

    def __call__(self) -> dict[str, jax.Array]:
        # It is 0 where there is no response token.
        return {"logprob_sum": jax.block_until_ready(self.program(self.params, self.batch))}

    @property
    def flops(self) -> float:
        # The backward pass has two products for each one of the forward pass.
        return super().flops / 3


def _plan(config: RLConfig, spec: Any, layout: Any) -> Plan:
    """The memory plan; its limit decides where ``remat`` is ``auto``."""
    usable = usable_bytes(config, layout.mesh.devices.flat[0])
    plan = make_plan(config, spec, layout, reference=False, limit=usable if config.memory.remat == "auto" else None)
    needed = sum(plan.update.values())
    # A GPU says by itself that it is full; a CPU would take others' memory first.
    if jax.default_backend() == "cpu" and usable is not None and needed > usable:
        raise ConfigError(f"memory: the step is planned to take {needed / GIB:.1f} GiB, {usable / GIB:.1f} are usable")
    return plan
