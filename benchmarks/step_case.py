"""One case of benchmarks/train_step.py: a step is built, compiled, timed, and described."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import step_shapes
import step_torch
from kernel_times import profile
from step_config import Case
from step_ours import Ours, OurScoring, OurStep


def run_case(
    case: Case,
    *,
    steps: int,
    warm_up: int,
    peer: bool,
    ceiling_size: int | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """What :class:`Case` comes to; ``error`` where it fails."""
    result: dict[str, Any] = {"settings": dataclasses.asdict(case)}
    try:
        return result | _measure(case, steps, warm_up, peer, ceiling_size, trace)
    except Exception as error:
        return result | {"error": message(error)}


def _name(case: Case) -> str:
    return f"{case.model}-{case.length}-{'packed' if case.packed else 'padded'}-{case.remat}-{case.work}"


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _measure(
    case: Case, steps: int, warm_up: int, peer: bool, ceiling_size: int | None, trace: Path | None
) -> dict[str, Any]:
    ours = OurScoring(case) if case.work == "logprobs" else OurStep(case)
    for _ in range(warm_up):
        stats = ours()
    # Before anything else takes memory: the peak is that of the process.
    memory = ours.memory()
    if trace is not None:
        with profile(trace / _name(case)):
            ours()
        (trace / _name(case) / "program.txt").write_text(ours.program.as_text() or "", encoding="utf-8")
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
    flops = ours.flops
    median = statistics.median(seconds)
    result = {
        "strategy": ours.strategy,
        "remat": ours.remat,
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
        "lower_seconds": ours.lower_seconds,
        "compile_seconds": ours.compile_seconds,
        **{name: float(np.sum(value)) for name, value in stats.items()},
    }
    if ours.plan is not None:
        result["plan"] = {"update_bytes": sum(ours.plan.update.values()), "items": ours.plan.update}
    if theirs is not None:
        result["torch"] = _peer_summary(theirs, peer_seconds, ours, flops / ceiling)
        result["speed_over_torch"] = statistics.median(peer_seconds) / median
        result["fastest_over_torch"] = min(peer_seconds) / min(seconds)
    elif peer_error is not None:
        result["torch"] = {"error": peer_error}
    return result


def _peer(case: Case, ours: Ours, warm_up: int) -> tuple[Any, str | None]:
    """The same step by torch, warmed up; or None, and why it failed."""
    config = ours.config
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
            checkpointing=ours.remat == "full",
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            clip=0.2,
            update=case.work == "update",
        )
        for _ in range(warm_up):
            theirs()
    except Exception as error:
        return None, message(error)
    return theirs, None


def _peer_summary(theirs: Any, seconds: list[float], ours: Ours, ideal: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "fastest_seconds": min(seconds),
        "step_seconds": seconds,
        "tokens_per_second": ours.valid_tokens / median,
        "utilisation": ideal / median,
        "peak_bytes": step_torch.peak_bytes(),
        "checkpointing": theirs.checkpointing,
        "attention": theirs.attention,
        "threads": theirs.torch.get_num_threads(),
        "device": str(theirs.device),
    }


def _timed(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
