"""jaxrft's sides of benchmarks/grpo_step.py: ``RLTrainer`` as its users call it, one cycle a turn.

It generates by the native engine, or on a vLLM server of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpo_case
from turns import Turns, order

from jaxrft.config import ParallelConfig, RLConfig
from jaxrft.config.rollout import RolloutConfig, VLLMConfig
from jaxrft.config.rooms import ModelConfig, TrackingConfig
from jaxrft.tracking import read_metrics
from jaxrft.training import RLTrainer


def main() -> None:
    turns, wanted = Turns(), order()
    case, folder = grpo_case.read(wanted["case"]), Path(wanted["folder"])
    trainer = RLTrainer(
        folder / "model",
        config_of(case, wanted),
        grpo_case.make_reward(case),
        [{"prompt": text} for text in grpo_case.make_prompts(case)],
    )
    take_turns(trainer, turns)
    trainer.train()


def config_of(case: grpo_case.Case, wanted: dict[str, Any]) -> RLConfig:
    """No evaluation, checkpoints or completions on disk; metrics as always."""
    return RLConfig(
        output_dir=wanted["output"],
        seed=0,
        model=ModelConfig(dtype=case.dtype),
        parallel=ParallelConfig(compilation_cache=wanted["cache"], memory_fraction=wanted["memory_fraction"]),
        rollout=rollout_of(case, wanted["vllm"]),
        tracking=TrackingConfig(progress=False),
        num_generations=case.group,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.samples // case.micro_batch,
        max_prompt_length=case.prompt_length,
        max_completion_length=case.new_tokens,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        max_steps=10**6,
        save_steps=None,
        log_completions=False,
    )


def rollout_of(case: grpo_case.Case, vllm: str | None) -> RolloutConfig:
    """The native engine; on a server, a share of the GPU that leaves room for the other sides."""
    if vllm is None:
        return RolloutConfig(max_slots=case.samples)
    return RolloutConfig(engine="vllm", max_slots=case.samples, vllm=VLLMConfig(python=vllm, gpu_memory=0.2))


def take_turns(trainer: RLTrainer, turns: Turns) -> None:
    """Makes every cycle of the trainer's run wait for its turn."""
    from jaxrft.training.cycle import Cycle

    metrics = trainer.folder.metrics
    cycle = Cycle.run
    trainer.hand_over = turns.timed("weights", trainer.hand_over)

    def describe(seconds: float) -> dict[str, Any]:
        record = read_metrics(metrics)[-1]
        phases = {name: record[f"time/{name}"] for name in ("rollout", "rewards", "training")}
        # The weights go over while training is still being timed.
        phases["training"] -= turns.seconds["weights"]
        return {
            "phases": phases | {"weights": turns.seconds["weights"]},
            "compiled": {"programs": record["compiles"], "seconds": record["time/compile"]},
            "loss": record["loss"],
            "threads": len(os.sched_getaffinity(0)),
        }

    def run(self: Cycle) -> None:
        turns.next(describe)
        cycle(self)

    Cycle.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
