"""One case of benchmarks/train_step.py: a step is built, compiled, timed, and described."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from typing import Any

import jax
import numpy as np
import step_shapes
import step_torch

from jaxrft import models
from jaxrft.config import ConfigError, RLConfig
from jaxrft.config.rollout import RolloutConfig
from jaxrft.config.rooms import BatchingConfig, MemoryConfig, ModelConfig, ParallelConfig
from jaxrft.parallel.description import GIB
from jaxrft.training.learner import UNBOUNDED, Learner
from jaxrft.training.parts import build_layout, build_model, build_recipe
from jaxrft.training.plan import Plan, make_plan, usable_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a step is measured for.

    Attributes:
        model: one of :data:`step_shapes.SHAPES`.
        length: tokens of the longest sample.
        dtype: of the computation; parameters are float32.
        strategy: None: the one that shards most on the mesh.
        mesh: devices of each axis.
        remat, scan_layers: as in the config's ``memory``.
        packed: whether rows hold several samples.
        micro_batches: of a step; packed ones follow from the lengths.
        rows: samples of a device in a micro-batch.
    """

    model: str
    length: int
    dtype: str
    strategy: str | None
    mesh: dict[str, int]
    remat: str
    scan_layers: bool
    packed: bool
    micro_batches: int
    rows: int

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.mesh.values())))


def config_of(case: Case) -> RLConfig:
    """GRPO's loss without a reference, on responses, with clipped gradients."""
    prompts = step_shapes.prompt_room(case.length)
    return RLConfig(
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        num_generations=1,
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=case.micro_batches,
        max_prompt_length=prompts,
        max_completion_length=case.length - prompts,
        model=ModelConfig(dtype=case.dtype),
        parallel=ParallelConfig(strategy=case.strategy, **case.mesh),
        memory=MemoryConfig(remat=case.remat, scan_layers=case.scan_layers),
        batching=BatchingConfig(pack=case.packed),
        rollout=RolloutConfig(max_slots=1),
    )


class OurStep:
    """The trainer's jitted optimizer step, compiled; one step at each call.

    Raises:
        ConfigError: the settings contradict each other, or a CPU has not the memory.
    """

    def __init__(self, case: Case, fields: dict[str, Any] | None = None):
        config = config_of(case)
        layout = build_layout(config)
        fields = fields or step_shapes.hf_config(case.model, case.length)
        self.spec = models.spec_from_config(fields)
        self.plan = _plan(config, self.spec, layout)
        model = models.from_config(fields, dtype=case.dtype, layout=layout, seed=config.seed)
        model = build_model(config, model, None, layout, self.plan.remat)
        self.learner = Learner(config, build_recipe(config), model, layout, total_steps=10**6)
        self.samples = step_shapes.make_samples(config.rollout_samples, case.length, self.spec.vocab_size)
        self.batch = self.learner.prepare(self.samples, score_old=False)
        self.kl_coef = np.float32(0.0)
        start = time.perf_counter()
        # Not Learner.update, which also brings the statistics to the host: the program alone, called as it calls it.
        lowered = self.learner._step.lower(self.learner.state, self.batch, UNBOUNDED, self.kl_coef)
        self.lower_seconds = time.perf_counter() - start
        self.program = lowered.compile()
        self.compile_seconds = time.perf_counter() - start - self.lower_seconds

    def __call__(self) -> dict[str, jax.Array]:
        self.learner.state, stats = self.program(self.learner.state, self.batch, UNBOUNDED, self.kl_coef)
        jax.block_until_ready((self.learner.state, stats))
        return stats

    @property
    def valid_tokens(self) -> int:
        return sum(sample.length for sample in self.samples)

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        parts, rows, length = self.batch.tokens.shape
        used = parts if self.batch.used is None else int(np.sum(np.asarray(self.batch.used)))
        return used * rows * length

    def memory(self) -> dict[str, Any]:
        """Of each device, or of the one that holds most: what its allocator saw, else what the program takes."""
        analysis = self.program.memory_analysis()
        program = {
            "arguments_bytes": analysis.argument_size_in_bytes,
            "temporary_bytes": analysis.temp_size_in_bytes,
        }
        stats = [device.memory_stats() for device in self.learner.layout.mesh.devices.flat]
        if jax.default_backend() == "cpu" or not all(stats):
            return {"peak_bytes": sum(program.values()), "source": "program: arguments + temporaries", **program}
        peak = max(found["peak_bytes_in_use"] for found in stats if found)
        return {"peak_bytes": peak, "source": "device: peak_bytes_in_use of the process", **program}


def _plan(config: RLConfig, spec: Any, layout: Any) -> Plan:
    """The memory plan; its limit decides where ``remat`` is ``auto``."""
    usable = usable_bytes(config, layout.mesh.devices.flat[0])
    plan = make_plan(config, spec, layout, reference=False, limit=usable if config.memory.remat == "auto" else None)
    needed = sum(plan.update.values())
    # A GPU says by itself that it is full; a CPU would take others' memory first.
    if jax.default_backend() == "cpu" and usable is not None and needed > usable:
        raise ConfigError(f"memory: the step is planned to take {needed / GIB:.1f} GiB, {usable / GIB:.1f} are usable")
    return plan


def run_case(case: Case, *, steps: int, warm_up: int, peer: bool, ceiling_size: int | None = None) -> dict[str, Any]:
    """What :class:`Case` comes to; ``error`` where it fails."""
    result: dict[str, Any] = {"settings": dataclasses.asdict(case)}
    try:
        return result | _measure(case, steps, warm_up, peer, ceiling_size)
    except Exception as error:
        return result | {"error": message(error)}


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _measure(case: Case, steps: int, warm_up: int, peer: bool, ceiling_size: int | None) -> dict[str, Any]:
    ours = OurStep(case)
    for _ in range(warm_up):
        stats = ours()
    # Before anything else takes memory: the peak is that of the process.
    memory = ours.memory()
    theirs, peer_error = _peer(case, ours, warm_up) if peer and case.devices == 1 else (None, None)
    ceilings = [step_shapes.matmul_ceiling(case.dtype, ceiling_size)]
    seconds: list[float] = []
    peer_seconds: list[float] = []
    for _ in range(steps):
        seconds.append(_timed(ours))
        if theirs is not None:
            peer_seconds.append(_timed(theirs))
    ceilings.append(step_shapes.matmul_ceiling(case.dtype, ceiling_size))
    # Virtual devices share one machine, whose cores the product on one of them takes all.
    real = 1 if jax.default_backend() == "cpu" else case.devices
    ceiling = real * max(found["flops_per_second"] for found in ceilings)
    flops = step_shapes.model_flops(ours.spec, ours.samples)
    median = statistics.median(seconds)
    result = {
        "strategy": ours.learner.layout.strategy,
        "remat": ours.plan.remat,
        "samples": len(ours.samples),
        "valid_tokens": ours.valid_tokens,
        "computed_tokens": ours.computed_tokens,
        "batch_shape": list(ours.batch.tokens.shape),
        "seconds": median,
        "fastest_seconds": min(seconds),
        "step_seconds": seconds,
        "tokens_per_second": ours.valid_tokens / median,
        "computed_tokens_per_second": ours.computed_tokens / median,
        "model_flops": flops,
        "matmul_ceiling": {"flops_per_second": ceiling, "devices_counted": real, "runs": ceilings},
        "utilisation": flops / median / ceiling,
        "memory": memory,
        "plan": {"update_bytes": sum(ours.plan.update.values()), "items": ours.plan.update},
        "lower_seconds": ours.lower_seconds,
        "compile_seconds": ours.compile_seconds,
        "loss": float(stats["loss"]),
        "grad_norm": float(stats["grad_norm"]),
    }
    if theirs is not None:
        result["torch"] = _peer_summary(theirs, peer_seconds, ours, flops / ceiling)
        result["speed_over_torch"] = statistics.median(peer_seconds) / median
        result["fastest_over_torch"] = min(peer_seconds) / min(seconds)
    elif peer_error is not None:
        result["torch"] = {"error": peer_error}
    return result


def _peer(case: Case, ours: OurStep, warm_up: int) -> tuple[Any, str | None]:
    """The same step by torch, warmed up; or None, and why it failed."""
    config = ours.learner.config
    try:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        fields = step_shapes.hf_config(case.model, case.length)
        model = step_torch.make_model(fields, device, len(os.sched_getaffinity(0)))
        if model is None:
            return None, "torch or transformers is not installed"
        theirs = step_torch.TorchStep(
            model,
            ours.batch,
            dtype=case.dtype,
            checkpointing=ours.plan.remat == "full",
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            clip=0.2,
        )
        for _ in range(warm_up):
            theirs()
    except Exception as error:
        return None, message(error)
    return theirs, None


def _peer_summary(theirs: Any, seconds: list[float], ours: OurStep, ideal: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "fastest_seconds": min(seconds),
        "step_seconds": seconds,
        "tokens_per_second": ours.valid_tokens / median,
        "utilisation": ideal / median,
        "peak_bytes": step_torch.peak_bytes(),
        "checkpointing": theirs.checkpointing,
        "threads": theirs.torch.get_num_threads(),
        "device": str(theirs.device),
    }


def _timed(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
