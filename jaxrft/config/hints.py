"""What a person may have meant by a key that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that TRL, other trainers or habit have for our fields.
OTHER_NAMES = {
    "adam_eps": "adam_epsilon",
    "adam_offload": "memory.offload_optimizer",
    "algorithm.name": "algorithm.recipe",
    "attn_implementation": "model.attention",
    "base_model": "model.path",
    "batch_size": "per_device_train_batch_size",
    "bf16": "model.dtype",
    "cache_dir": "parallel.compilation_cache",
    "clip_eps": "epsilon",
    "clip_range": "epsilon",
    "cliprange": "epsilon",
    "context_parallel_size": "parallel.sequence",
    "cp_size": "parallel.sequence",
    "cpu_offload": "memory.offload_optimizer",
    "dataset": "data.train",
    "dataset_config": "data.train",
    "dataset_name": "data.train",
    "dataset_test_split": "data.eval_split",
    "dataset_train_split": "data.train_split",
    "deepspeed": "parallel.strategy",
    "do_eval": "data.eval",
    "enable_gradient_checkpointing": "memory.remat",
    "enforce_eager": "rollout.vllm.eager",
    "engine_mem_util": "rollout.vllm.gpu_memory",
    "engine_tp_size": "rollout.vllm.tensor_parallel",
    "engine_type": "rollout.engine",
    "epochs": "num_train_epochs",
    "epsilon_low": "epsilon",
    "eval_dataset": "data.eval",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "flash_attn": "model.attention",
    "fp16": "model.dtype",
    "free_cache_engine": "rollout.vllm.sleep",
    "fsdp": "parallel.strategy",
    "fsdp_size": "parallel.fsdp",
    "full_determinism": "parallel.deterministic",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "grad_clip": "max_grad_norm",
    "gradient_checkpointing": "memory.remat",
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
    "max_num_seqs": "rollout.max_slots",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_token_len_per_gpu": "batching.tokens_per_device",
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
    "offload_optimizer": "memory.offload_optimizer",
    "optimizer_offload": "memory.offload_optimizer",
    "packing": "batching.pack",
    "per_device_eval_batch_size": "rollout.max_slots",
    "ppo_epochs": "num_iterations",
    "ppo_max_token_len_per_gpu": "batching.tokens_per_device",
    "ref_offload": "memory.offload_reference",
    "resume": "resume_from_checkpoint",
    "reward_funcs": "rewards.functions",
    "reward_functions": "rewards.functions",
    "rollout.name": "rollout.engine",
    "save_strategy": "save_steps",
    "schedule": "lr_scheduler_type",
    "sp_size": "parallel.sequence",
    "stop_strings": "rollout.stop",
    "tensor_parallel_size": "parallel.tensor",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "tp_size": "parallel.tensor",
    "train_batch_size": "per_device_train_batch_size",
    "train_dataset": "data.train",
    "ulysses_sequence_parallel_size": "parallel.sequence",
    "use_dynamic_bsz": "batching.pack",
    "use_vllm": "rollout.engine",
    "vllm_enable_sleep_mode": "rollout.vllm.sleep",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "vllm_mode": "rollout.engine",
    "vllm_num_engines": "rollout.vllm.servers",
    "vllm_server_base_url": "rollout.vllm.urls",
    "vllm_tensor_parallel_size": "rollout.vllm.tensor_parallel",
    "warmup": "warmup_steps",
    "zero_stage": "parallel.strategy",
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
    swapped = sorted(name) == sorted(other)
    likeness = max(_ratio(name, other), 0.8 if part or swapped else 0)
    return likeness if section == other_section else max(likeness - 0.15, _ratio(key.lower(), path.lower()))


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
