"""What a person may have meant by a key that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that TRL, other trainers or habit have for our fields.
OTHER_NAMES = {
    "adam_eps": "adam_epsilon",
    "algorithm.name": "algorithm.recipe",
    "base_model": "model.path",
    "batch_size": "per_device_train_batch_size",
    "bf16": "model.dtype",
    "cache_dir": "parallel.compilation_cache",
    "clip_eps": "epsilon",
    "clip_range": "epsilon",
    "cliprange": "epsilon",
    "dataset": "data.train",
    "dataset_config": "data.train",
    "dataset_name": "data.train",
    "dataset_test_split": "data.eval_split",
    "dataset_train_split": "data.train_split",
    "do_eval": "data.eval",
    "epochs": "num_train_epochs",
    "epsilon_low": "epsilon",
    "eval_dataset": "data.eval",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "fp16": "model.dtype",
    "full_determinism": "parallel.deterministic",
    "gpu_memory_utilization": "parallel.memory_fraction",
    "grad_clip": "max_grad_norm",
    "group_size": "num_generations",
    "init_kl_coef": "beta",
    "kl": "beta",
    "kl_beta": "beta",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "logging_dir": "output_dir",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_epochs": "num_train_epochs",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "max_train_steps": "max_steps",
    "mini_batch_size": "per_device_train_batch_size",
    "model.name": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "n_samples_per_prompt": "num_generations",
    "num_epochs": "num_train_epochs",
    "num_ppo_epochs": "num_iterations",
    "num_samples": "num_generations",
    "per_device_eval_batch_size": "rollout.max_slots",
    "ppo_epochs": "num_iterations",
    "resume": "resume_from_checkpoint",
    "reward_funcs": "rewards.functions",
    "reward_functions": "rewards.functions",
    "save_strategy": "save_steps",
    "schedule": "lr_scheduler_type",
    "stop_strings": "rollout.stop",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "train_batch_size": "per_device_train_batch_size",
    "train_dataset": "data.train",
    "use_vllm": "rollout.engine",
    "vllm_gpu_memory_utilization": "parallel.memory_fraction",
    "vllm_mode": "rollout.engine",
    "warmup": "warmup_steps",
}


def nearest(key: str, known: Iterable[str]) -> list[str]:
    """At most three existing keys that ``key`` may stand for, likeliest first.

    Args:
        key: full path of a key that does not exist, such as ``rolout.max_slot``.
        known: full paths of all keys, those of the sections included.
    """
    known = [path for path in known if not key.startswith(f"{path}.")]
    name = key.rpartition(".")[2]
    same_name = [path for path in known if path.rpartition(".")[2] == name]
    other_name = OTHER_NAMES.get(key) or OTHER_NAMES.get(name)
    if other_name or same_name:
        return list(dict.fromkeys([*([other_name] if other_name else []), *same_name]))[:3]
    scores = {path: _likeness(key, path) for path in known}
    bar = max(0.65, max(scores.values()) - 0.1)
    return sorted((path for path in known if scores[path] >= bar), key=lambda path: -scores[path])[:3]


def _likeness(key: str, path: str) -> float:
    """Of the names; a little less in another section, or that of the whole paths if it is more."""
    (section, _, name), (other_section, _, other) = key.lower().rpartition("."), path.lower().rpartition(".")
    part = len(name) > 3 and (name in other or other in name)
    likeness = max(_ratio(name, other), 0.8 if part else 0)
    return likeness if section == other_section else max(likeness - 0.15, _ratio(key.lower(), path.lower()))


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
