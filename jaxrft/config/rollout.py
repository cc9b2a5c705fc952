"""How completions are generated: the engine, and the servers of the vLLM engine."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxrft.config.base import ConfigError, Section, option

# vLLM's own bound.
VLLM_MAX_TEMPERATURE = 2.0
# Options of its server that a run sets, or that would take weights or requests elsewhere.
OPTIONS_OF_A_RUN = frozenset([
    "api-key", "api-server-count", "data-parallel-size", "dtype", "enable-sleep-mode", "enforce-eager",
    "generation-config", "gpu-memory-utilization", "host", "load-format", "logprobs-mode", "max-model-len",
    "max-num-seqs", "middleware", "model", "pipeline-parallel-size", "port", "served-model-name",
    "skip-tokenizer-init", "tensor-parallel-size", "worker-extension-cls",
])  # fmt: skip
LAST_PORT = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLLMConfig(Section):
    """The servers of rollout.engine=vllm: started by the run, or running already."""

    python: str | None = option(
        None, "Python of an environment that has vLLM, such as ~/vllm/bin/python. None: the one that runs the trainer."
    )
    urls: list[str] = option(
        factory=list,
        help="Addresses of servers that run already, such as http://127.0.0.1:8000, in place of starting any. Their "
        "API key is taken from the environment variable JAXRFT_VLLM_API_KEY.",
    )
    servers: int = option(1, "Servers to start; requests are spread over them.", minimum=1)
    tensor_parallel: int = option(1, "GPUs that share the model in each server.", minimum=1)
    devices: list[int] | None = option(
        None, "Numbers of the GPUs for the servers, server after server. None: the trainer's own, from the first on."
    )
    port: int | None = option(
        None, "Port of the first server on 127.0.0.1, the others follow. None: any that is free.", minimum=1024,
        maximum=LAST_PORT,
    )  # fmt: skip
    gpu_memory: float = option(0.5, "Share of a GPU's memory that a server takes.", above=0, below=1)
    cpu_cache_gib: int = option(1, "GiB of a server's caches, on a CPU.", minimum=1)
    sleep: bool = option(
        False,
        "Have the servers give their GPUs' memory back while training runs. JAX can use it only where its allocator "
        "returns memory too (XLA_PYTHON_CLIENT_ALLOCATOR), which it does not by default.",
    )
    eager: bool = option(False, "Run without captured graphs: starts faster, generates slower. A CPU always does.")
    arguments: list[str] = option(factory=list, help="Further options of vLLM's server, such as [--block-size, '32'].")
    transport: Literal["auto", "cuda_ipc", "shared_memory", "nccl"] = option(
        "auto",
        "How weights get to the servers: memory of the GPU that both use (cuda_ipc), of the machine (shared_memory), "
        "or from GPU to GPU (nccl). auto: the fastest that reaches them.",
    )
    bucket_mib: int = option(
        256,
        "MiB of weights that travel together. Two such buckets are in memory at the trainer, one at each worker.",
        minimum=1,
    )
    checksum: bool = option(False, "Check every bucket of weights on arrival. Slow on a GPU.")
    request_seeds: bool = option(
        True,
        "Draw each completion with a seed of its own, so that it does not depend on the others. On a GPU vLLM draws "
        "tokens faster without.",
    )
    startup_seconds: float = option(900.0, "Time a server may take to start.", above=0)
    request_seconds: float = option(1800.0, "Time a request may take: all completions of one prompt.", above=0)

    def check(self) -> None:
        given = {word.partition("=")[0].lstrip("-").replace("_", "-") for word in self.arguments if word[:2] == "--"}
        if fixed := sorted(given & OPTIONS_OF_A_RUN):
            raise ConfigError(f"arguments: --{fixed[0]} follows from the run's other settings: remove it")
        if self.urls:
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            started = (
                "python",
                "servers",
                "tensor_parallel",
                "devices",
                "port",
                "gpu_memory",
                "cpu_cache_gib",
                "sleep",
            )
            for name in (*started, "eager"):
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"{name}: set with urls, whose servers are started already: remove one")
            if self.arguments:
                raise ConfigError("arguments: set with urls, whose servers are started already: remove one")
            if len(set(self.urls)) < len(self.urls):
                raise ConfigError("urls: names a server twice")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"urls: got {url!r}, takes addresses such as http://127.0.0.1:8000")
        wanted = self.servers * self.tensor_parallel
        if self.devices is not None and (len(set(self.devices)) != wanted or len(self.devices) != wanted):
            raise ConfigError(
                f"devices: got {self.devices}, takes {wanted} different numbers (servers x tensor_parallel)"
            )
        if self.devices is not None and min(self.devices) < 0:
            raise ConfigError(f"devices: got {self.devices}, takes numbers of at least 0")
        if self.port is not None and self.port + self.servers - 1 > LAST_PORT:
            raise ConfigError(
                f"port: got {self.port}, takes at most {LAST_PORT + 1 - self.servers} for {self.servers} servers"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """How completions are generated."""

    engine: Literal["native", "vllm"] = option(
        "native",
        "native generates inside the trainer, from its own parameters; vllm on servers, to which they are copied.",
    )
    max_slots: int = option(
        64,
        "Completions generated at the same time, by each server. Where the native engine's are shared out over several "
        "devices, it takes a multiple of their number that is not larger, but one for each at least.",
        minimum=1,
    )
    decode_chunk: int = option(
        8, "Tokens decoded for every slot before the native engine looks at what has ended.", minimum=1
    )
    quantization: Literal["none", "fp8"] = option(
        "none",
        "fp8: the native engine generates from kernels in 8-bit floating point, half the bytes of bfloat16. Its "
        "probabilities are then not the trainer's, which wants algorithm.correction.",
    )
    min_tokens: int = option(0, "Tokens a completion has at least.", minimum=0)
    stop: list[str] = option(factory=list, help="Texts that end a completion. They stay in it.")
    stop_token_ids: list[int] = option(
        factory=list, help="Tokens that end a completion beside the tokenizer's end-of-sequence token."
    )
    first_token_temperature: float | None = option(
        None, "Temperature of a completion's first token (FIRE sampling). None: temperature.", minimum=1e-3
    )
    missing_logprobs: Literal["stop", "trainer"] = option(
        "stop",
        "Where an engine cannot know log-probabilities without truncation (vllm with top_p, top_k, min_p or "
        "min_tokens, at a temperature other than 1): stop, or take the trainer's own in their place; no correction "
        "for an engine that differs from the trainer is made then.",
    )
    parity: Literal["first", "always", "never"] = option(
        "first",
        "When fixed prompts go through engine and trainer, to compare log-probabilities: after the first transfer of "
        "weights to servers, after each, or never. audit.logprob_tolerance bounds the gap.",
    )
    vllm: VLLMConfig = option(factory=VLLMConfig, help="The servers of the engine vllm.")

    def check(self) -> None:
        if self.engine != "vllm" and self.vllm != VLLMConfig():
            raise ConfigError(f"vllm: set with engine {self.engine}; set engine=vllm, or remove it")
        if self.engine == "vllm" and self.quantization != "none":
            raise ConfigError(
                f"quantization: got {self.quantization} with engine vllm; it is the native engine's: remove it, or set "
                "engine=native"
            )
