"""What a vLLM server is started with."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from jaxrft.models.checkpoint import export_config
from jaxrft.models.decoder import Decoder
from jaxrft.models.weight_files import write_json

SERVER_SIDE = Path(__file__).resolve().parent.parent / "server_side"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """One server process.

    Attributes:
        model: folder with config.json, and the tokenizer where there is one.
        python: interpreter of an environment that has vLLM.
        port: on 127.0.0.1.
        dtype: of weights and activations.
        max_length: tokens of prompt and completion together at most.
        max_sequences: completions generated at the same time.
        logprobs_mode: what it reports of each token.
        tokenizer: whether ``model`` holds one.
        tensor_parallel: GPUs that share the model.
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them; None: those that this process sees.
        gpu_memory: share of a GPU's memory.
        cpu_cache_gib: GiB of its caches, on a CPU.
        cpu_cores: of each of its workers there, as VLLM_CPU_OMP_THREADS_BIND takes them; None: vLLM chooses.
        sleep: whether it can give its memory back.
        eager: no graphs are captured or compiled.
        more: further options of vLLM's.
        key: that every request must carry.
    """

    model: Path
    python: str = sys.executable
    port: int
    dtype: str
    max_length: int
    max_sequences: int
    logprobs_mode: str
    tokenizer: bool
    tensor_parallel: int = 1
    devices: tuple[str, ...] | None = None
    gpu_memory: float = 0.5
    cpu_cache_gib: int = 1
    cpu_cores: str | None = None
    sleep: bool = False
    eager: bool = False
    more: tuple[str, ...] = ()
    key: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def command(self) -> list[str]:
        """The command line; the key is not on it, where every user of the machine could read it."""
        options: dict[str, Any] = {
            "model": self.model,
            "served-model-name": "policy",
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.max_length,
            "max-num-seqs": self.max_sequences,
            "tensor-parallel-size": self.tensor_parallel,
            "gpu-memory-utilization": self.gpu_memory,
            "logprobs-mode": self.logprobs_mode,
            # Weights come from the trainer; sampling is what each request says, not what the model's folder says.
            "load-format": "dummy",
            "generation-config": "vllm",
            "uvicorn-log-level": "warning",
        }
        flags = {
            "enable-sleep-mode": self.sleep,
            "enforce-eager": self.eager,
            "skip-tokenizer-init": not self.tokenizer,
        }
        words = [self.python, str(SERVER_SIDE / "jaxrft_server.py")]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += [f"--{name}" for name, on in flags.items() if on]
        return [*words, *self.more]

    def environment(self) -> dict[str, str]:
        """Variables of the process: this one's, without what concerns its Python and its JAX."""
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {n: v for n, v in os.environ.items() if n not in dropped and not n.startswith(("JAX_", "XLA_"))}
        kept |= {"VLLM_API_KEY": self.key, "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib)}
        # All it reads lies in the folder; nothing is looked up or reported elsewhere.
        kept |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.cpu_cores is not None:
            kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", self.cpu_cores)
        if self.devices is not None:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return kept


def cpu_cores(server: int, servers: int, workers: int) -> str | None:
    """Cores of a server's workers where several share the machine: left alone, vLLM gives all of them the same ones.

    Args:
        server: which one.
        servers: that there are.
        workers: of each server.

    Returns:
        None for a single worker, which has the machine to itself.
    """
    together = servers * workers
    if together == 1:
        return None
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // together, 1)
    firsts = [worker * each % len(cores) for worker in range(server * workers, (server + 1) * workers)]
    return "|".join(",".join(map(str, cores[first : first + each])) for first in firsts)


def write_model_folder(folder: Path, model: Decoder, tokenizer: Any, dtype: str) -> None:
    """What a server reads of a model before its weights come: config.json, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**export_config(model), "dtype": dtype, "torch_dtype": dtype})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
