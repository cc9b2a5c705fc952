"""No field of the config does nothing: each is read outside of the config, and each has a test of its effect."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from jaxrft.config import ParallelConfig, RLConfig, RolloutConfig
from jaxrft.config.base import option
from jaxrft.config.rl import RECIPE_FIELDS
from tests.config.leaf_reads import Leaf, leaves, properties, reads

ROOT = Path(__file__).resolve().parents[2]
LEAVES = leaves(RLConfig)

DEVICES, PARTS, RECIPES, RUNS, SERVERS, UPDATES = (
    f"tests/config/test_effects_on_{name}.py" for name in ("devices", "parts", "recipes", "runs", "servers", "updates")
)
ENVIRONMENT = "tests/config/test_environment.py"

# Field -> the test that shows what it changes.
EFFECTS = {
    "task": "tests/config/test_command_line.py::test_the_task_chooses_what_runs",
    "output_dir": f"{RUNS}::test_output_dir",
    "run_name": f"{RUNS}::test_tracker",
    "resume_from_checkpoint": "tests/training/test_resume.py::test_interrupted_and_resumed_is_bit_equal",
    "seed": f"{UPDATES}::SAMPLING",
    "learning_rate": f"{UPDATES}::test_schedule",
    "lr_scheduler_type": f"{UPDATES}::test_schedule",
    "warmup_steps": f"{UPDATES}::test_schedule",
    "warmup_ratio": f"{UPDATES}::test_schedule",
    "weight_decay": f"{UPDATES}::test_adamw",
    "adam_beta1": f"{UPDATES}::test_adamw",
    "adam_beta2": f"{UPDATES}::test_adamw",
    "adam_epsilon": f"{UPDATES}::test_adamw",
    "max_grad_norm": f"{UPDATES}::test_max_grad_norm",
    "num_train_epochs": f"{RUNS}::test_length_of_a_run",
    "max_steps": f"{RUNS}::test_length_of_a_run",
    "per_device_train_batch_size": f"{UPDATES}::BATCHES",
    "gradient_accumulation_steps": f"{UPDATES}::BATCHES",
    "steps_per_generation": f"{UPDATES}::BATCHES",
    "generation_batch_size": f"{UPDATES}::BATCHES",
    "num_iterations": f"{UPDATES}::BATCHES",
    "shuffle_dataset": f"{RUNS}::test_shuffle_dataset",
    "num_generations": f"{UPDATES}::BATCHES",
    "max_prompt_length": "tests/data/test_prompts.py::test_long_prompts_are_dropped_and_counted_or_refused",
    "max_completion_length": f"{UPDATES}::SAMPLING",
    "temperature": f"{UPDATES}::SAMPLING",
    "top_p": f"{UPDATES}::SAMPLING",
    "top_k": f"{UPDATES}::SAMPLING",
    "min_p": f"{UPDATES}::SAMPLING",
    "beta": f"{RECIPES}::RECIPE",
    "epsilon": f"{RECIPES}::RECIPE",
    "epsilon_high": f"{RECIPES}::RECIPE",
    "loss_type": f"{RECIPES}::RECIPE",
    "scale_rewards": f"{RECIPES}::RECIPE",
    "importance_sampling_level": f"{RECIPES}::RECIPE",
    "delta": f"{RECIPES}::RECIPE",
    "top_entropy_quantile": f"{RECIPES}::RECIPE",
    "use_bias_correction_kl": f"{RECIPES}::RECIPE",
    "off_policy_mask_threshold": f"{RECIPES}::RECIPE",
    "multi_objective_aggregation": f"{RECIPES}::RECIPE",
    "sapo_temperature_pos": f"{RECIPES}::RECIPE",
    "sapo_temperature_neg": f"{RECIPES}::RECIPE",
    "mask_truncated_completions": f"{UPDATES}::test_mask_truncated_completions",
    "reward_weights": f"{PARTS}::test_rewards",
    "eval_on_start": f"{RUNS}::test_evaluations",
    "eval_steps": f"{RUNS}::test_evaluations",
    "num_generations_eval": f"{RUNS}::test_evaluations",
    "logging_steps": f"{RUNS}::test_logging_steps",
    "report_to": "tests/tracking/test_loggers.py::test_tensorboard_holds_the_metrics_and_purges_what_is_run_again",
    "log_completions": f"{RUNS}::test_completions",
    "num_completions_to_print": f"{RUNS}::test_completions",
    "save_steps": f"{RUNS}::test_checkpoints",
    "save_total_limit": f"{RUNS}::test_checkpoints",
    "metric_for_best_model": "tests/training/test_resume.py::test_best_checkpoint_is_kept",
    "greater_is_better": "tests/training/test_resume.py::test_best_checkpoint_is_kept",
    "model.path": f"{PARTS}::test_model",
    "model.scratch": f"{PARTS}::test_model",
    "model.tokenizer": f"{PARTS}::test_model",
    "model.dtype": f"{PARTS}::test_model",
    "model.attention": f"{DEVICES}::test_attention",
    "model.param_dtype": f"{DEVICES}::test_param_dtype",
    "model.loss_scale": f"{DEVICES}::test_loss_scale",
    "model.loss_scale_steps": f"{DEVICES}::test_loss_scale",
    "data.train": f"{PARTS}::test_prompts",
    "data.eval": f"{PARTS}::test_prompts",
    "data.train_split": f"{PARTS}::test_prompts_of_a_split",
    "data.eval_split": f"{PARTS}::test_prompts_of_a_split",
    "data.arguments": f"{PARTS}::test_prompts_of_a_function",
    "data.columns": f"{PARTS}::test_prompts",
    "data.system_prompt": f"{PARTS}::test_prompts_of_a_function",
    "data.chat_template": f"{PARTS}::test_prompts_of_a_function",
    "data.overlong_prompts": f"{PARTS}::test_prompts",
    "data.max_train_samples": f"{PARTS}::test_prompts",
    "data.max_eval_samples": f"{PARTS}::test_prompts",
    "rewards.functions": f"{PARTS}::test_rewards",
    "rewards.arguments": f"{PARTS}::test_rewards",
    "rewards.on_error": "tests/rewards/test_reward_set.py::test_an_exception_can_count_as_none",
    "rewards.timeout": f"{PARTS}::test_rewards",
    "rewards.overlap": "tests/training/test_overlapped_runs.py::test_rewards_begin_before_the_last_group_has_ended",
    "rollout.engine": f"{PARTS}::test_engine",
    "rollout.max_slots": f"{PARTS}::test_engine",
    "rollout.decode_chunk": f"{PARTS}::test_engine",
    "rollout.quantization": f"{PARTS}::test_engine",
    "rollout.min_tokens": f"{UPDATES}::SAMPLING",
    "rollout.stop": f"{UPDATES}::SAMPLING",
    "rollout.stop_token_ids": f"{UPDATES}::SAMPLING",
    "rollout.first_token_temperature": f"{UPDATES}::SAMPLING",
    "rollout.missing_logprobs": "tests/training/test_copied_weights.py::test_missing_logprobs",
    "rollout.parity": "tests/training/test_copied_weights.py::test_parity_is_due",
    "rollout.vllm.python": f"{SERVERS}::test_python",
    "rollout.vllm.urls": f"{SERVERS}::test_urls",
    "rollout.vllm.servers": f"{SERVERS}::test_servers",
    "rollout.vllm.tensor_parallel": f"{SERVERS}::COMMAND",
    "rollout.vllm.devices": f"{SERVERS}::test_devices",
    "rollout.vllm.port": f"{SERVERS}::COMMAND",
    "rollout.vllm.gpu_memory": f"{SERVERS}::COMMAND",
    "rollout.vllm.cpu_cache_gib": f"{SERVERS}::test_environment",
    "rollout.vllm.sleep": f"{SERVERS}::FLAGS",
    "rollout.vllm.eager": f"{SERVERS}::FLAGS",
    "rollout.vllm.arguments": f"{SERVERS}::FLAGS",
    "rollout.vllm.transport": f"{SERVERS}::test_urls",
    "rollout.vllm.bucket_mib": f"{SERVERS}::test_urls",
    "rollout.vllm.checksum": f"{SERVERS}::test_urls",
    "rollout.vllm.request_seeds": f"{SERVERS}::test_urls",
    "rollout.vllm.startup_seconds": f"{SERVERS}::test_startup_seconds",
    "rollout.vllm.request_seconds": f"{SERVERS}::test_urls",
    "parallel.strategy": f"{DEVICES}::LAYOUTS",
    "parallel.replica": f"{UPDATES}::BATCHES",
    "parallel.fsdp": f"{DEVICES}::LAYOUTS",
    "parallel.sequence": f"{DEVICES}::LAYOUTS",
    "parallel.tensor": f"{DEVICES}::LAYOUTS",
    "parallel.virtual_devices": f"{ENVIRONMENT}::test_effect_in_a_new_process",
    "parallel.memory_fraction": f"{ENVIRONMENT}::test_memory_fraction",
    "parallel.xla_flags": f"{ENVIRONMENT}::test_xla_flags_are_appended",
    "parallel.compilation_cache": f"{ENVIRONMENT}::test_effect_in_a_new_process",
    "parallel.compile_ahead": f"{RUNS}::test_compile_ahead",
    "parallel.optimization_level": f"{ENVIRONMENT}::test_optimization_level",
    "parallel.deterministic": f"{ENVIRONMENT}::test_xla_flags_are_appended",
    "memory.remat": f"{DEVICES}::test_remat",
    "memory.remat_names": f"{DEVICES}::test_remat_names",
    "memory.scan_layers": f"{DEVICES}::test_scan_layers",
    "memory.offload_optimizer": f"{DEVICES}::test_offload",
    "memory.offload_reference": f"{DEVICES}::test_offload",
    "memory.device_gib": "tests/training/test_plan.py::test_limits",
    "batching.pack": f"{UPDATES}::PACKING",
    "batching.tokens_per_device": f"{UPDATES}::PACKING",
    "batching.row_length": f"{UPDATES}::PACKING",
    "algorithm.recipe": f"{RECIPES}::test_named_recipe",
    "algorithm.dynamic_sampling": f"{RECIPES}::RECIPE",
    "algorithm.max_draws": f"{RECIPES}::RECIPE",
    "algorithm.difficulty_low": f"{RECIPES}::RECIPE",
    "algorithm.difficulty_high": f"{RECIPES}::RECIPE",
    "algorithm.overlong_buffer": f"{RECIPES}::RECIPE",
    "algorithm.overlong_factor": f"{RECIPES}::RECIPE",
    "algorithm.length_penalty": f"{RECIPES}::RECIPE",
    "algorithm.running_norm": f"{RECIPES}::RECIPE",
    "algorithm.reward_clip": f"{RECIPES}::RECIPE",
    "algorithm.estimator": f"{RECIPES}::test_fields_of_a_critic",
    "algorithm.baseline": f"{RECIPES}::RECIPE",
    "algorithm.scale": f"{RECIPES}::RECIPE",
    "algorithm.aggregation": f"{RECIPES}::RECIPE",
    "algorithm.group_weight": f"{RECIPES}::RECIPE",
    "algorithm.group_weight_cap": f"{RECIPES}::RECIPE",
    "algorithm.gamma": f"{RECIPES}::RECIPE",
    "algorithm.lam": f"{RECIPES}::test_fields_of_a_critic",
    "algorithm.length_alpha": f"{RECIPES}::test_fields_of_a_critic",
    "algorithm.whiten": f"{RECIPES}::RECIPE",
    "algorithm.advantage_clip": f"{RECIPES}::RECIPE",
    "algorithm.objective": f"{RECIPES}::RECIPE",
    "algorithm.level": f"{RECIPES}::RECIPE",
    "algorithm.clip_low": f"{RECIPES}::RECIPE",
    "algorithm.clip_high": f"{RECIPES}::RECIPE",
    "algorithm.dual_clip": f"{RECIPES}::RECIPE",
    "algorithm.ratio_cap": f"{RECIPES}::RECIPE",
    "algorithm.drift_coef": f"{RECIPES}::RECIPE",
    "algorithm.drift_clip": f"{RECIPES}::RECIPE",
    "algorithm.sapo_positive": f"{RECIPES}::RECIPE",
    "algorithm.sapo_negative": f"{RECIPES}::RECIPE",
    "algorithm.cov_share": f"{RECIPES}::RECIPE",
    "algorithm.cov_low": f"{RECIPES}::RECIPE",
    "algorithm.cov_high": f"{RECIPES}::RECIPE",
    "algorithm.cov_coef": f"{RECIPES}::RECIPE",
    "algorithm.dro_coef": f"{RECIPES}::RECIPE",
    "algorithm.gvpo_coef": f"{RECIPES}::RECIPE",
    "algorithm.vespo_positive": f"{RECIPES}::RECIPE",
    "algorithm.vespo_negative": f"{RECIPES}::RECIPE",
    "algorithm.entropy_share": f"{RECIPES}::RECIPE",
    "algorithm.entropy_scope": f"{RECIPES}::RECIPE",
    "algorithm.correction": f"{RECIPES}::RECIPE",
    "algorithm.correction_level": f"{RECIPES}::RECIPE",
    "algorithm.correction_low": f"{RECIPES}::RECIPE",
    "algorithm.correction_high": f"{RECIPES}::RECIPE",
    "algorithm.sequence_mask": f"{RECIPES}::RECIPE",
    "algorithm.reduction": f"{RECIPES}::RECIPE",
    "algorithm.kl_coef": f"{RECIPES}::RECIPE",
    "algorithm.kl_kind": f"{RECIPES}::RECIPE",
    "algorithm.kl_weighted": f"{RECIPES}::RECIPE",
    "algorithm.kl_in_reward": f"{RECIPES}::RECIPE",
    "algorithm.kl_target": f"{RECIPES}::RECIPE",
    "algorithm.kl_horizon": f"{RECIPES}::RECIPE",
    "evaluation.temperature": f"{UPDATES}::SAMPLING",
    "evaluation.top_p": f"{UPDATES}::SAMPLING",
    "tracking.progress": f"{RUNS}::test_progress",
    "tracking.wandb_project": f"{RUNS}::test_wandb",
    "tracking.wandb_mode": "tests/tracking/test_loggers.py::test_wandb_offline_keeps_its_id_and_sends_nothing_twice",
    "audit.enabled": f"{RUNS}::test_audit_enabled",
    "audit.ratio_tolerance": "tests/training/test_audit.py::test_old_logprobs_of_other_parameters",
    "audit.logprob_tolerance": "tests/training/test_audit.py::test_the_audit_can_be_turned_off_and_loosened",
    "watchdog.rollout": f"{RUNS}::PHASES",
    "watchdog.rewards": f"{RUNS}::PHASES",
    "watchdog.training": f"{RUNS}::PHASES",
    "watchdog.evaluation": f"{RUNS}::PHASES",
    "watchdog.checkpoint": f"{RUNS}::PHASES",
    "warm_start.max_steps": f"{UPDATES}::test_warm_start_length",
    "warm_start.target_accuracy": f"{UPDATES}::test_warm_start_length",
    "warm_start.eval_steps": f"{UPDATES}::test_warm_start_length",
    "warm_start.batch_size": f"{UPDATES}::test_warm_start_length",
    "warm_start.learning_rate": f"{UPDATES}::test_warm_start_learning_rate",
    "warm_start.answer_column": f"{UPDATES}::test_warm_start_answer_column",
}


def sources() -> list[str]:
    """All modules but the config room's; of that, the one that sets the environment."""
    modules = [path for path in (ROOT / "jaxrft").rglob("*.py") if path.parent.name != "config"]
    return [path.read_text() for path in [*modules, ROOT / "jaxrft" / "config" / "environment.py"]]


def of_properties() -> dict[str, set[Leaf]]:
    folder = ROOT / "jaxrft" / "config"
    of_parallel = properties((folder / "rooms.py").read_text(), ParallelConfig, ())
    return of_parallel | properties((folder / "rl.py").read_text(), RLConfig, RECIPE_FIELDS)


def test_every_field_is_read():
    read = reads(sources(), RLConfig, of_properties())
    assert not sorted(path for leaf, path in LEAVES.items() if leaf not in read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InventedRollout(RolloutConfig):
    """With a field that nothing reads."""

    invented: int = option(1, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invented(RLConfig):
    """With the same."""

    rollout: InventedRollout = option(factory=InventedRollout, help="")


def test_an_invented_field_is_found():
    """Neither the package nor code that merely has the word in it reads it."""
    leaf = ("InventedRollout", "invented")
    assert leaves(Invented)[leaf] == "rollout.invented"
    assert leaf not in reads(sources(), Invented, {})


READ = [
    "def f(config: Invented): return config.rollout.invented",
    "def f(settings: InventedRollout | None): return settings.invented",
    "def f(trainer): return trainer.config.rollout.invented",
    "class A:\n  def g(self): return self.r.invented\n  def __init__(self, config: Invented): self.r = config.rollout",
    "def f(config: Invented):\n  a, b = config.rollout, 3\n  return a.invented",
    "def f(rollout: InventedRollout):\n  return getattr(rollout, name)\nf('invented')",
]
UNREAD = [
    "def f(config: Invented): return config.audit.invented",
    "def f(config: Invented): config.rollout.invented = 3",
    "def f(other): return other.invented + other.rollout.invented",
    "def f(config: Invented):\n  config = other\n  return config.rollout.invented",
    "def f(config: Invented): return 'config.rollout.invented'",
    "def f(rollout: InventedRollout): return 'invented'",
    "jax.config.rollout.invented",
]


@pytest.mark.parametrize("source", READ)
def test_reads_that_count(source):
    assert ("InventedRollout", "invented") in reads([source], Invented, {})


@pytest.mark.parametrize("source", UNREAD)
def test_reads_that_do_not_count(source):
    assert ("InventedRollout", "invented") not in reads([source], Invented, {})


def test_reads_through_properties():
    found = of_properties()
    assert ("RLConfig", "steps_per_generation") in found["updates_per_rollout"]
    assert ("AlgorithmConfig", "kl_kind") in found["algorithm_overrides"]
    source = "def f(config: RLConfig): return config.rollout_prompts"
    assert ("RLConfig", "num_generations") in reads([source], RLConfig, found)
    source = "def f(config: RLConfig): return config.parallel.chosen_strategy"
    assert ("ParallelConfig", "strategy") in reads([source], RLConfig, found)


def source_of(test: str) -> str | None:
    """The text of a test function, or of the table that one is parametrized with; None where there is none."""
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return None
    text = (ROOT / path).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name and name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and text.count(name) > 1:
            return ast.get_source_segment(text, node)
    return None


def test_every_field_has_a_test_of_its_effect():
    assert sorted(EFFECTS) == sorted(LEAVES.values())
    without = [path for path, test in EFFECTS.items() if not mentions(source_of(test), path)]
    assert not without


def mentions(source: str | None, path: str) -> bool:
    return source is not None and re.search(rf"\b{path.rpartition('.')[2]}\b", source) is not None


def test_the_table_can_fail():
    assert not mentions(source_of(f"{UPDATES}::test_schedule"), "adam_beta1")
    assert source_of(f"{UPDATES}::test_missing") is None
    assert source_of("tests/missing.py::test_schedule") is None
