"""The config of a reinforcement fine-tuning run.

Fields that TRL's ``GRPOConfig`` has too keep its name and meaning and stand at the top
level; all else is nested by room.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxrft.config.algorithm import AlgorithmConfig
from jaxrft.config.base import ConfigError, Section, option
from jaxrft.config.rollout import VLLM_MAX_TEMPERATURE, RolloutConfig
from jaxrft.config.rooms import (
    AuditConfig,
    BatchingConfig,
    DataConfig,
    EvaluationConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RewardsConfig,
    TrackingConfig,
    WarmStartConfig,
    WatchdogConfig,
)

# Top-level field (TRL's name) -> field of ``algorithm`` that holds the same thing.
RECIPE_FIELDS = {
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "beta": "kl_coef",
    "loss_type": "reduction",
    "scale_rewards": "scale",
    "importance_sampling_level": "level",
    "delta": "ratio_cap",
    "top_entropy_quantile": "entropy_share",
    "use_bias_correction_kl": "kl_weighted",
    "off_policy_mask_threshold": "sequence_mask",
    "multi_objective_aggregation": "aggregation",
    "sapo_temperature_pos": "sapo_positive",
    "sapo_temperature_neg": "sapo_negative",
}
LOSS_TYPES = {"grpo": "sequence_mean", "dapo": "token_mean", "dr_grpo": "constant"}
REWARD_SCALES = {"group": "std", "batch": "batch_std", "none": "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Section):
    """Config of ``RLTrainer`` and of ``python -m jaxrft.train``."""

    task: Literal["rl", "sft", "preference", "reward"] = option("rl", "Kind of training. This version has rl.")
    output_dir: str = option(
        "runs/default", "Folder of the run: config, metrics, completions, checkpoints, final model."
    )
    run_name: str | None = option(None, "Name shown by loggers. None: the last part of output_dir.")
    resume_from_checkpoint: bool = option(
        False, "Continue the run that output_dir holds. Without it, a folder that holds a run is refused."
    )
    seed: int = option(42, "Seed of the data's order, of sampling and of new parameters.", minimum=0, below=2**31)

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.", minimum=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "Course of the learning rate after warm-up: to zero in a line or half a cosine, or constant."
    )
    warmup_steps: int = option(0, "Optimizer steps over which the learning rate rises from zero.", minimum=0)
    warmup_ratio: float = option(0.0, "The same as a share of all optimizer steps.", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "Decoupled weight decay, on matrices only (not on biases and norms).", minimum=0)
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.", minimum=0, below=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.", minimum=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm; 0 does not clip.", minimum=0)

    num_train_epochs: float = option(1.0, "Passes over the training prompts, where max_steps is -1.", above=0)
    max_steps: int = option(-1, "Optimizer steps of the run; -1: as num_train_epochs says.", minimum=-1)
    per_device_train_batch_size: int = option(8, "Completions a device takes in one micro-batch.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches summed into one optimizer step.", minimum=1)
    steps_per_generation: int | None = option(
        None, "Micro-batches made from one rollout. None: gradient_accumulation_steps.", minimum=1
    )
    generation_batch_size: int | None = option(
        None, "Completions of one rollout, in place of steps_per_generation.", minimum=1
    )
    num_iterations: int = option(1, "Times that each rollout is trained on.", minimum=1)
    shuffle_dataset: bool = option(True, "Shuffle the training prompts anew in each epoch.")

    num_generations: int = option(8, "Completions of a prompt: the size of a group.", minimum=1)
    max_prompt_length: int = option(512, "Tokens a prompt has at most (see data.overlong_prompts).", minimum=1)
    max_completion_length: int = option(256, "Tokens a completion has at most.", minimum=1)
    temperature: float = option(
        1.0, "Sampling temperature; log-probabilities are of the same temperature.", minimum=1e-3
    )
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this probability.", above=0, maximum=1)
    top_k: int = option(0, "Sample from the k most probable tokens; 0: from all.", minimum=0)
    min_p: float = option(
        0.0, "Sample from tokens with this share of the best token's probability.", minimum=0, maximum=1
    )

    beta: float | None = option(None, "Weight of the KL to the reference model. None: the recipe's.", minimum=0)
    epsilon: float | None = option(None, "Clip range of the ratio below 1. None: the recipe's.", minimum=0, maximum=1)
    epsilon_high: float | None = option(None, "Clip range above 1. None: the recipe's, else epsilon.", minimum=0)
    loss_type: Literal["grpo", "dapo", "dr_grpo"] | None = option(
        None, "Reduction of the token losses: of sequence means, of tokens, over a constant. None: the recipe's."
    )
    scale_rewards: Literal["group", "batch", "none"] | None = option(
        None, "Divide advantages by the standard deviation of the group, of the batch, or not. None: the recipe's."
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = option(
        None, "Level of the importance ratio. None: the recipe's."
    )
    delta: float | None = option(None, "Bound of ratios that are not clipped. None: the recipe's.", above=1)
    top_entropy_quantile: float | None = option(
        None, "Train only this share of the tokens, those of highest entropy. None: the recipe's.", above=0, maximum=1
    )
    use_bias_correction_kl: bool | None = option(
        None, "Multiply the KL in the loss by the token's ratio. None: the recipe's."
    )
    off_policy_mask_threshold: float | None = option(
        None, "Leave out sequences of negative advantage that have drifted this far. None: the recipe's.", minimum=0
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = option(
        None, "Several rewards are summed before they are normalised, or after. None: the recipe's."
    )
    sapo_temperature_pos: float | None = option(
        None, "Sharpness of sapo's gate for positive advantages. None: the recipe's.", above=0
    )
    sapo_temperature_neg: float | None = option(None, "For all others. None: the recipe's.", above=0)
    mask_truncated_completions: bool = option(
        False, "Leave completions that reached max_completion_length out of the loss."
    )
    reward_weights: list[float] | None = option(None, "Weight of each reward. None: 1 each.")

    eval_on_start: bool = option(True, "Evaluate before the first step, where there are held-out prompts.")
    eval_steps: int | None = option(
        None, "Optimizer steps between evaluations. None: only before and after.", minimum=1
    )
    num_generations_eval: int = option(1, "Completions of each held-out prompt.", minimum=1)
    logging_steps: int = option(1, "Optimizer steps between records of the metrics.", minimum=1)
    report_to: list[Literal["wandb", "tensorboard"]] = option(
        factory=list, help="Loggers beside the console and metrics.jsonl: wandb, tensorboard."
    )
    log_completions: bool = option(True, "Write prompts, completions and rewards of every rollout to the run's folder.")
    num_completions_to_print: int = option(0, "Completions of every rollout shown on the console.", minimum=0)
    save_steps: int | None = option(
        100, "Optimizer steps between checkpoints, at ends of rollouts. None: only at the end.", minimum=1
    )
    save_total_limit: int = option(2, "Newest checkpoints kept.", minimum=1)
    metric_for_best_model: str | None = option(
        None, "Metric by which one more checkpoint, the best, is kept, such as eval/reward."
    )
    greater_is_better: bool = option(True, "Whether a larger metric_for_best_model is better.")

    model: ModelConfig = option(factory=ModelConfig, help="The model.")
    data: DataConfig = option(factory=DataConfig, help="The prompts.")
    rewards: RewardsConfig = option(factory=RewardsConfig, help="The rewards.")
    rollout: RolloutConfig = option(factory=RolloutConfig, help="The engine.")
    parallel: ParallelConfig = option(factory=ParallelConfig, help="The devices.")
    memory: MemoryConfig = option(factory=MemoryConfig, help="What is kept on the devices.")
    batching: BatchingConfig = option(factory=BatchingConfig, help="The micro-batches.")
    algorithm: AlgorithmConfig = option(factory=AlgorithmConfig, help="The algorithm.")
    evaluation: EvaluationConfig = option(factory=EvaluationConfig, help="The evaluation.")
    tracking: TrackingConfig = option(factory=TrackingConfig, help="The loggers.")
    audit: AuditConfig = option(factory=AuditConfig, help="The audit of the first update.")
    watchdog: WatchdogConfig = option(factory=WatchdogConfig, help="The time budgets.")
    warm_start: WarmStartConfig = option(factory=WarmStartConfig, help="The supervised stage before RL.")

    def check(self) -> None:
        if self.task != "rl":
            raise ConfigError(f"task: got {self.task!r}, which this version does not have yet; takes rl")
        self._check_batches()
        self._check_packing()
        self._check_schedule()
        self._check_recipe_fields()
        self._check_sampling()

    def _check_batches(self) -> None:
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ConfigError(
                "generation_batch_size: set with steps_per_generation; each follows from the other: remove one"
            )
        micro = self.per_device_train_batch_size * self.parallel.data_devices
        if self.rollout_samples % micro:
            raise ConfigError(
                f"generation_batch_size: got {self.rollout_samples}, takes a multiple of per_device_train_batch_size x "
                f"parallel.replica x parallel.fsdp ({micro})"
            )
        if self.micro_batches % self.gradient_accumulation_steps:
            raise ConfigError(
                f"steps_per_generation: got {self.micro_batches}, takes a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps})"
            )
        if self.rollout_samples % self.num_generations:
            raise ConfigError(
                f"num_generations: got {self.num_generations}, which does not divide the {self.rollout_samples} "
                "completions of a rollout (per_device_train_batch_size x parallel.replica x parallel.fsdp x "
                "steps_per_generation); change one of them or set generation_batch_size"
            )

    def _check_packing(self) -> None:
        longest = self.max_prompt_length + self.max_completion_length
        for name in ("row_length", "tokens_per_device"):
            value = getattr(self.batching, name)
            if value is not None and value < longest:
                raise ConfigError(
                    f"batching.{name}: got {value}, takes at least max_prompt_length + max_completion_length "
                    f"({longest}): the longest sample must fit"
                )

    def _check_schedule(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError("warmup_ratio: set with warmup_steps; remove one")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ConfigError("lr_scheduler_type: constant has no warm-up; takes constant_with_warmup here")
        if self.max_steps == 0:
            raise ConfigError("max_steps: got 0, takes -1 or a number of steps of at least 1")

    def _check_recipe_fields(self) -> None:
        for name, nested in RECIPE_FIELDS.items():
            if getattr(self, name) is not None and getattr(self.algorithm, nested) is not None:
                raise ConfigError(f"{name}: set with algorithm.{nested}, which is the same thing; remove one")

    def _check_sampling(self) -> None:
        if self.rollout.min_tokens > self.max_completion_length:
            raise ConfigError(
                f"rollout.min_tokens: got {self.rollout.min_tokens}, takes at most max_completion_length "
                f"({self.max_completion_length})"
            )
        hottest = max(self.temperature, self.rollout.first_token_temperature or 0.0)
        if self.rollout.engine == "vllm" and hottest > VLLM_MAX_TEMPERATURE:
            raise ConfigError(
                f"rollout.engine: vllm takes temperatures up to {VLLM_MAX_TEMPERATURE:g}, not {hottest:g}; lower it, "
                "or take the native engine"
            )
        if self.engine_lacks_logprobs and self.rollout.missing_logprobs == "stop":
            raise ConfigError(
                "rollout.missing_logprobs: vllm does not know log-probabilities without truncation (top_p, top_k, "
                "min_p, rollout.min_tokens) at a temperature other than 1; set temperature=1, remove the truncation, "
                "or set rollout.missing_logprobs=trainer"
            )
        if self.num_generations_eval > 1 and self.evaluation.temperature == 0:
            raise ConfigError(
                "num_generations_eval: several greedy completions are all the same; set evaluation.temperature above 0"
            )
        rewards = len(self.rewards.functions)
        if self.reward_weights is not None and rewards and len(self.reward_weights) != rewards:
            raise ConfigError(f"reward_weights: got {len(self.reward_weights)} weights for {rewards} rewards")

    @property
    def engine_lacks_logprobs(self) -> bool:
        """Whether completions to train on come without log-probabilities: a server has one mode for all requests."""
        truncates = self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.rollout.min_tokens > 0
        first = self.rollout.first_token_temperature
        return self.rollout.engine == "vllm" and truncates and (self.temperature != 1 or first not in (None, 1.0))

    @property
    def rollout_samples(self) -> int:
        """Completions of one rollout."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.per_device_train_batch_size * self.parallel.data_devices * steps

    @property
    def rollout_prompts(self) -> int:
        """Prompts of one rollout."""
        return self.rollout_samples // self.num_generations

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one pass over a rollout."""
        return self.rollout_samples // (self.per_device_train_batch_size * self.parallel.data_devices)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.micro_batches // self.gradient_accumulation_steps * self.num_iterations

    @property
    def algorithm_overrides(self) -> dict[str, object]:
        """The fields of the recipe that this config sets, by their names in ``algorithm``."""
        nested = {f.name: getattr(self.algorithm, f.name) for f in dataclasses.fields(self.algorithm)}
        nested.pop("recipe")
        values = {RECIPE_FIELDS[name]: getattr(self, name) for name in RECIPE_FIELDS}
        values["reduction"] = LOSS_TYPES.get(self.loss_type) if self.loss_type else None
        values["scale"] = REWARD_SCALES.get(self.scale_rewards) if self.scale_rewards else None
        merged = {name: value if value is not None else values.get(name) for name, value in nested.items()}
        return {name: value for name, value in merged.items() if value is not None}
