"""One vLLM server of a model's shape for a benchmark, behind the engine that a run would use."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrft.models import Decoder
from jaxrft.rollout.vllm import wire
from jaxrft.rollout.vllm.engine import VLLMEngine
from jaxrft.rollout.vllm.options import ServerOptions, write_model_folder
from jaxrft.rollout.vllm.process import ServerProcess, free_port
from jaxrft.rollout.vllm.server import Server


@contextlib.contextmanager
def vllm_engine(
    python: str,
    model: Decoder,
    *,
    dtype: str,
    max_length: int,
    max_sequences: int = 64,
    temperature: float = 1.0,
    gpu_memory: float = 0.4,
    **transfer: Any,
) -> Iterator[tuple[VLLMEngine, str]]:
    """Starts a server, and ends it with the block.

    Args:
        python: interpreter of an environment that has vLLM.
        model: to be served; it may be abstract.
        dtype: of the server's weights and activations.
        max_length: tokens of prompt and completion together at most.
        max_sequences: completions generated at the same time.
        temperature: at which completions will be drawn.
        gpu_memory: share of the GPU's memory.
        transfer: ``transport``, ``bucket_bytes`` and ``checksum`` of the engine.

    Yields:
        An engine without weights, and vLLM's version.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="jaxrft-benchmark-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        write_model_folder(folder / "model", model, None, dtype)
        options = ServerOptions(
            model=folder / "model",
            python=python,
            port=free_port(),
            dtype=dtype,
            max_length=max_length,
            max_sequences=max_sequences,
            logprobs_mode=wire.mode_for([temperature]),
            tokenizer=False,
            devices=_gpu(transfer.get("transport")) if jax.default_backend() == "gpu" else None,
            gpu_memory=gpu_memory,
        )
        process = ServerProcess(options, folder / "server.log")
        stack.callback(process.stop)
        process.wait(900.0, lambda line: print(line, file=sys.stderr, flush=True))
        server = stack.enter_context(contextlib.closing(Server(process.url, options.key, process.name, 1800.0)))
        engine = VLLMEngine(
            [server], model, max_length=max_length, max_sequences=max_sequences,
            on_failure=process.check_alive, **transfer,
        )  # fmt: skip
        stack.enter_context(engine)
        yield engine, server.vllm_version


def _gpu(transport: str | None) -> tuple[str]:
    """The trainer's first GPU, as CUDA_VISIBLE_DEVICES names it; its last one where a broadcast has to get there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(jax.local_device_count())]
    return (names[-1 if transport == "nccl" else 0],)
