"""Real vLLM servers for tests, in the environment that ``scripts/test.sh`` makes for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrft.data import load_tokenizer
from jaxrft.models import Decoder, DecoderSpec
from jaxrft.rollout.server_side.jaxrft_watch import start_time
from jaxrft.rollout.vllm.engine import VLLMEngine
from jaxrft.rollout.vllm.options import ServerOptions, cpu_cores, write_model_folder
from jaxrft.rollout.vllm.process import ServerProcess, free_port
from jaxrft.rollout.vllm.server import Server
from tests.rollout.tiny import random_model

TOKENIZER = load_tokenizer("characters:0123456789+=")
MAX_LENGTH = 48
# vLLM's attention on a CPU takes heads of 32 and more.
SPEC = DecoderSpec(
    vocab_size=len(TOKENIZER),
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_positions=64,
    tie_embeddings=True,
    qkv_bias=True,
)


def vllm_python(version: str | None = None) -> str:
    """Interpreter with vLLM; skips the test where there is none.

    Args:
        version: None takes the newest that is tested.
    """
    name = "JAXRFT_TEST_VLLM" if version is None else f"JAXRFT_TEST_VLLM_{version.replace('.', '_')}"
    python = os.environ.get(name)
    if not python:
        pytest.skip(f"{name} does not name a Python that has vLLM; scripts/test.sh makes one")
    return python


@contextlib.contextmanager
def running(
    folder: Path, model: Decoder, *, python: str, tokenizer: Any = TOKENIZER, count: int = 1, **options: Any
) -> Iterator[list[ServerProcess]]:
    """Servers of a model without weights."""
    dtype = options.pop("dtype", "float32")
    write_model_folder(folder / "model", model, tokenizer, dtype)
    defaults: dict[str, Any] = {"max_length": MAX_LENGTH, "max_sequences": 64, "logprobs_mode": "raw_logprobs"}
    processes: list[ServerProcess] = []
    try:
        for number in range(count):
            chosen = ServerOptions(
                model=folder / "model",
                python=python,
                port=free_port(),
                dtype=dtype,
                tokenizer=tokenizer is not None,
                cpu_cores=cpu_cores(number, count, options.get("tensor_parallel", 1)),
                **{**defaults, **options},
            )
            processes.append(ServerProcess(chosen, folder / f"server-{number}.log", f"server {number}"))
        for process in processes:
            process.wait(300)
        yield processes
    finally:
        for process in processes:
            process.stop()


def connect(processes: list[ServerProcess], model: Decoder, **options: Any) -> VLLMEngine:
    """An engine on servers that run; they go on when it is closed."""
    servers = [Server(p.url, p.options.key, p.name, request_seconds=120) for p in processes]
    tokenizer = options.pop("tokenizer", TOKENIZER)
    return VLLMEngine(servers, model, tokenizer, max_length=options.pop("max_length", MAX_LENGTH), **options)


def group_members(process: ServerProcess) -> list[int]:
    """Living processes that a server started, itself among them."""
    members = []
    for number in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(OSError):
            if os.getpgid(number) == process.pid and start_time(number) is not None:
                members.append(number)
    return members


def models(count: int, spec: DecoderSpec = SPEC, dtype: Any = np.float32) -> list[Decoder]:
    """The same model with other weights each."""
    return [random_model(seed, spec, dtype) for seed in range(count)]
