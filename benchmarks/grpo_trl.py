"""TRL's side of benchmarks/grpo_step.py: ``GRPOTrainer`` with transformers' generate, one optimizer step a turn."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import grpo_case
import torch
from datasets import Dataset
from torch_device import torch_device
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Turns, order


def main() -> None:
    turns, wanted = Turns(), order()
    case, folder = grpo_case.read(wanted["case"]), Path(wanted["folder"])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Not AutoTokenizer: it would split words as Qwen2 does, by the model's type.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model", padding_side="left")
    # It wants such a token. Past the model's vocabulary it is never drawn, and prompts of one length are not padded.
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        args=arguments_of(case, wanted),
        reward_funcs=grpo_case.make_reward(case),
        train_dataset=Dataset.from_list([{"prompt": text} for text in grpo_case.make_prompts(case)]),
        processing_class=tokenizer,
    )
    trainer._prepare_inputs = turns.timed("preparation", trainer._prepare_inputs)
    trainer._generate_single_turn = turns.timed("rollout", trainer._generate_single_turn)
    trainer._calculate_rewards = turns.timed("rewards", trainer._calculate_rewards)
    trainer.add_callback(Waits(turns, str(trainer.model.device)))
    trainer.train()


def arguments_of(case: grpo_case.Case, wanted: dict[str, Any]) -> GRPOConfig:
    """The same loss and optimizer as the other sides'; nothing logged, evaluated or saved."""
    return GRPOConfig(
        output_dir=wanted["output"],
        seed=0,
        use_cpu=torch_device(wanted["platform"]) == "cpu",
        bf16=case.dtype == "bfloat16",
        model_init_kwargs={"dtype": wanted["param_dtype"]},
        num_generations=case.group,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.samples // case.micro_batch,
        gradient_checkpointing=False,
        max_completion_length=case.new_tokens,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        max_steps=10**6,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Waits(TrainerCallback):
    """Makes every step wait for its turn."""

    def __init__(self, turns: Turns, device: str):
        self.turns, self.device = turns, device

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.next(self.describe, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)

    def describe(self, seconds: float) -> dict[str, Any]:
        spent = self.turns.seconds
        phases = {name: spent[name] for name in ("rollout", "rewards")}
        # All but the making of a batch: losses, gradients, the optimizer.
        phases["training"] = seconds - spent["preparation"]
        versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
        return {"phases": phases, "versions": versions, "threads": torch.get_num_threads(), "device": self.device}


if __name__ == "__main__":
    main()
