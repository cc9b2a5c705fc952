"""The nested sections of a run's config, one class a room."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrft.config.base import ConfigError, Section, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which model is trained."""

    path: str | None = option(None, "Folder with a Hugging Face checkpoint, or a hub name.")
    scratch: dict[str, Any] | None = option(
        None,
        "Train a model made from scratch instead: the fields of a Hugging Face config.json "
        "(model_type, hidden_size, num_hidden_layers, ...). vocab_size is taken from the tokenizer.",
    )
    tokenizer: str | None = option(
        None,
        "Folder or hub name of the tokenizer, or 'characters:' followed by the alphabet of a "
        "tokenizer with one token per character. None takes the model's own.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Type that activations are computed in. Gradients are summed, and moments kept, in float32."
    )
    attention: Literal["auto", "dense", "chunked", "cudnn", "triton"] = option(
        "auto",
        "How attention is computed: whole arrays of scores (dense), blocks of them (chunked), or a fused kernel on a "
        "GPU. auto takes the fastest that fits type, head size, mask and length, and says which.",
    )
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Type that parameters are kept in. bfloat16 halves them and rounds each update up or down at random, so that "
        "small updates count on average; it needs dtype bfloat16.",
    )
    loss_scale: float | None = option(
        None, "Factor of the loss at the start, with dtype float16; halved at each overflow. None: 65536.", minimum=1
    )
    loss_scale_steps: int | None = option(
        None, "Optimizer steps without an overflow after which that factor is doubled. None: 2000.", minimum=1
    )

    def check(self) -> None:
        if self.path is not None and self.scratch is not None:
            raise ConfigError("path: set with scratch; a model is either loaded or made from scratch: remove one")
        if self.scratch is not None and self.tokenizer is None:
            raise ConfigError(
                "tokenizer: got None, a model made from scratch needs one, such as 'characters:0123456789'"
            )
        if self.param_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ConfigError(f"param_dtype: got bfloat16, which needs dtype bfloat16, not {self.dtype}")
        for name in ("loss_scale", "loss_scale_steps"):
            if getattr(self, name) is not None and self.dtype != "float16":
                raise ConfigError(f"{name}: set with dtype {self.dtype}; only float16 has a loss scale: remove it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where prompts come from and how they become tokens."""

    train: str | None = option(
        None,
        "Training prompts: a .jsonl, .json, .parquet or .csv file, a folder, a hub name, or a function that "
        "returns a list of rows, as package.module:function or file.py:function.",
    )
    eval: str | None = option(None, "Held-out prompts, given like train.")
    train_split: str = option("train", "Split of a hub dataset or folder to train on.")
    eval_split: str = option(
        "test", "Split of a hub dataset or folder to evaluate on, where it is the one named in eval."
    )
    arguments: dict[str, Any] = option(
        factory=dict, help="Keyword arguments for train and eval where they are functions."
    )
    columns: dict[str, str] = option(
        factory=dict,
        help="Our name of a column -> its name in the dataset, as in {prompt: question, answer: solution}.",
    )
    system_prompt: str | None = option(None, "System message put before every prompt.")
    chat_template: str | None = option(
        None, "Jinja chat template, or a file that holds one. None takes the tokenizer's own."
    )
    overlong_prompts: Literal["drop", "error"] = option(
        "drop", "Prompts of more than max_prompt_length tokens: drop and count them, or stop."
    )
    max_train_samples: int | None = option(None, "Use only the first rows of train.", minimum=1)
    max_eval_samples: int | None = option(None, "Use only the first rows of eval.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """What is rewarded."""

    functions: list[str] = option(
        factory=list,
        help="Rewards by name (exact_match, math, format_tags, format_boxed, length), or one's own as "
        "package.module:function or file.py:function.",
    )
    arguments: dict[str, dict[str, Any]] = option(
        factory=dict, help="Keyword arguments of a reward, by its name, as in {length: {target: 100}}."
    )
    on_error: Literal["stop", "none"] = option(
        "stop", "When a reward raises: stop and name the sample, or count the sample as None (reward does not apply)."
    )
    timeout: float = option(
        5.0, "Seconds that one answer may take a reward which runs in a process of its own.", above=0
    )
    overlap: bool = option(
        False,
        "Call rewards while completions are still generated: several times a rollout, each time with the whole groups "
        "that have ended since. A reward then sees some of the rollout's prompts at a time, in a thread of its own.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Devices, what lies where on them, and how XLA uses them. A run takes the product of the four sizes."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] | None = option(
        None,
        "What is sharded over fsdp and sequence devices: nothing (ddp), optimizer moments (zero1), gradients too "
        "(zero2), parameters too (zero3, also called fsdp), or that within each of several replicas (hsdp). "
        "None: hsdp, fsdp or ddp, as the sizes allow.",
    )
    replica: int = option(
        1, "Groups of devices with a whole copy of all state; each takes a share of the batch.", minimum=1
    )
    fsdp: int = option(1, "Devices that take a share of the batch, and that state is sharded over.", minimum=1)
    sequence: int = option(1, "Devices that share the time steps of each row (context parallelism).", minimum=1)
    tensor: int = option(1, "Devices that share each layer's heads and channels, and the vocabulary.", minimum=1)
    virtual_devices: int | None = option(None, "Make this many CPU devices, to try a mesh without GPUs.", minimum=1)
    memory_fraction: float | None = option(
        None, "Share of a GPU's memory that JAX takes at its start. None leaves JAX's default.", above=0, maximum=1
    )
    xla_flags: str = option("", "Further flags for XLA, appended to XLA_FLAGS.")
    compilation_cache: str | None = option(
        "~/.cache/jaxrft/xla", "Folder of compiled programs, shared by runs. None compiles anew in each run."
    )
    compile_ahead: bool | None = option(
        None,
        "Compile the programs that score and train the longest samples while the first rollout runs (not of packed "
        "rows), and the step for others while these are scored. None: where there is a GPU; a CPU has no cores to "
        "spare.",
    )
    optimization_level: Literal["O0", "O1", "O2", "O3"] | None = option(
        None,
        "How much XLA optimises; from O1 on, messages between devices are hidden behind computation. None: O1 where a "
        "run takes several GPUs, else JAX's own.",
    )
    deterministic: bool = option(False, "Use only deterministic GPU kernels, so that a resumed run is bit-equal.")

    @property
    def data_devices(self) -> int:
        """Devices, or groups of them, that take different rows of a batch."""
        return self.replica * self.fsdp

    @property
    def chosen_strategy(self) -> str:
        """The strategy set, or the one that shards most on these sizes."""
        if self.strategy is not None:
            return self.strategy
        if self.fsdp * self.sequence == 1:
            return "ddp"
        return "hsdp" if self.replica > 1 else "fsdp"

    def check(self) -> None:
        shards, strategy = self.fsdp * self.sequence, self.strategy
        if strategy == "ddp" and self.fsdp > 1:
            raise ConfigError("strategy: ddp keeps whole copies of all state; set replica instead of fsdp")
        if strategy not in (None, "ddp") and shards == 1:
            raise ConfigError(
                f"strategy: {strategy} shards over fsdp and sequence devices, of which there is one; set fsdp"
            )
        if strategy in ("zero1", "zero2", "zero3", "fsdp") and self.replica > 1:
            raise ConfigError(
                f"strategy: {strategy} has no replicas; set fsdp instead of replica, or take hsdp, which shards "
                "within each replica"
            )
        if strategy == "hsdp" and self.replica == 1:
            raise ConfigError("strategy: hsdp shards within each of several replicas; set replica, or take fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section):
    """What is kept on the devices."""

    remat: Literal["auto", "none", "full", "save", "offload"] = option(
        "auto",
        "What the backward pass keeps of each layer: all (none), only its input, computing the rest again (full), the "
        "tensors in remat_names too (save), or these in the host's memory (offload). auto: the fastest that fits.",
    )
    remat_names: list[Literal["layer_input", "query", "key", "value", "attention", "gate", "up"]] = option(
        factory=lambda: ["query", "key", "value", "attention"],
        help="Tensors that save and offload keep.",
    )
    scan_layers: bool = option(
        False, "Run the layers in a loop: compiles in a fraction of the time, and takes a copy of sharded parameters."
    )
    offload_optimizer: bool = option(False, "Keep optimizer moments in the host's memory between steps.")
    offload_reference: bool = option(False, "Keep the reference model in the host's memory between uses.")
    device_gib: float | None = option(
        None, "Memory of one device, in GiB, that a run may count on. None: what the device reports.", above=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchingConfig(Section):
    """How samples become the rows of micro-batches."""

    pack: bool = option(
        False,
        "Put several samples into one row, so that little padding is computed. The updates stay the same. An optimizer "
        "step has as many samples as without; its micro-batches follow from their lengths.",
    )
    tokens_per_device: int | None = option(
        None,
        "Tokens a device takes in one packed micro-batch. None: as many as per_device_train_batch_size of the longest "
        "samples of this step have.",
        minimum=1,
    )
    row_length: int | None = option(
        None,
        "Tokens of a packed row; short rows cost attention less. None: as the step's longest sample needs.",
        minimum=1,
    )

    def check(self) -> None:
        for name in ("tokens_per_device", "row_length"):
            if getattr(self, name) is not None and not self.pack:
                raise ConfigError(f"{name}: set without pack; set pack=true, or remove it")
        if self.tokens_per_device is not None and self.tokens_per_device < (self.row_length or 0):
            raise ConfigError(
                f"tokens_per_device: got {self.tokens_per_device}, takes at least row_length ({self.row_length})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """How held-out prompts are answered."""

    temperature: float = option(0.0, "Sampling temperature of evaluation; 0 is greedy.", minimum=0)
    top_p: float = option(1.0, "Nucleus of evaluation's sampling.", above=0, maximum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """What a run shows and sends."""

    progress: bool = option(True, "Show progress bars on a terminal.")
    wandb_project: str = option("jaxrft", "Project of Weights & Biases.")
    wandb_mode: Literal["online", "offline", "disabled"] = option(
        "online", "Whether Weights & Biases sends, keeps in the run's folder, or does nothing."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig(Section):
    """Checks of the first update that stop a run which would train on wrong numbers."""

    enabled: bool = option(True, "Check the first update of a run.")
    ratio_tolerance: float | None = option(
        None,
        "Largest |ratio - 1| before the first update. None: 1e-5 largest in float32, 1e-2 mean in bfloat16.",
        above=0,
    )
    logprob_tolerance: float | None = option(
        None,
        "Largest gap of log-probabilities between engine and trainer. None: 1e-4 in float32, 5e-2 mean in bfloat16, "
        "1e-1 mean with rollout.quantization.",
        above=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig(Section):
    """Seconds a phase may take before the run is stopped with a report of where it hung. None: no limit."""

    rollout: float | None = option(3600.0, "Budget of one rollout.", above=0)
    rewards: float | None = option(1800.0, "Budget of scoring one rollout.", above=0)
    training: float | None = option(3600.0, "Budget of training on one rollout, compilation included.", above=0)
    evaluation: float | None = option(7200.0, "Budget of one evaluation.", above=0)
    checkpoint: float | None = option(1800.0, "Budget of saving one checkpoint.", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig(Section):
    """A short supervised stage before RL, for models made from scratch."""

    max_steps: int = option(0, "Supervised steps at most; 0 turns the stage off.", minimum=0)
    target_accuracy: float = option(
        1.0, "Stop when greedy accuracy on the held-out prompts first reaches this share.", above=0, maximum=1
    )
    eval_steps: int = option(20, "Steps between looks at that accuracy.", minimum=1)
    batch_size: int = option(256, "Examples a step.", minimum=1)
    learning_rate: float = option(
        3e-3, "Peak learning rate: warm-up over a tenth of max_steps, then constant.", above=0
    )
    answer_column: str = option("answer", "Column that holds the text to learn.")
