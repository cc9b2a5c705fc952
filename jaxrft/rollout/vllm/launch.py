"""From a config to an engine: servers started, or those that run already."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrft.config import ConfigError, RLConfig
from jaxrft.models.decoder import Decoder
from jaxrft.rollout.vllm import wire
from jaxrft.rollout.vllm.engine import VLLMEngine
from jaxrft.rollout.vllm.options import ServerOptions, cpu_cores, write_model_folder
from jaxrft.rollout.vllm.process import ServerProcess, free_port
from jaxrft.rollout.vllm.server import TESTED_VERSIONS, Server

KEY_VARIABLE = "JAXRFT_VLLM_API_KEY"


def engine_from(
    config: RLConfig, model: Decoder, tokenizer: Any, logs: Path, say: Callable[[str], None] = print
) -> VLLMEngine:
    """An engine on the servers that the config names, or on new ones.

    Args:
        config: of the run.
        model: to be served; its weights are not needed yet.
        tokenizer: the model's.
        logs: folder for the logs of servers that are started.
        say: takes lines about how far they are.

    Raises:
        ConfigError: a server cannot be started, or is not what the run needs.
        EngineError: a server did not answer in time.
    """
    closing = contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
        settings = config.rollout.vllm
        processes: list[ServerProcess] = []
        if settings.urls:
            key = os.environ.get(KEY_VARIABLE)
            addresses = [(url, key, f"vllm server {url}") for url in settings.urls]
        else:
            processes = _start(config, model, tokenizer, logs, say, stack)
            addresses = [(process.url, process.options.key, process.name) for process in processes]
        servers = []
        for url, key, name in addresses:
            servers.append(Server(url, key, name, settings.request_seconds))
            stack.callback(servers[-1].close)
        for server in servers:
            say(f"{server.name}: vLLM {server.vllm_version} on {_where(server)} answers")
            if server.vllm_version not in TESTED_VERSIONS:
                say(f"{server.name}: vLLM {server.vllm_version} is untested, tested are {', '.join(TESTED_VERSIONS)}")
            if (found := server.workers[0]["logprobs_mode"]) != _mode(config):
                raise ConfigError(
                    f"{server.name}: reports {found}, the temperatures of this run need {_mode(config)}; start it with "
                    f"--logprobs-mode {_mode(config)}"
                )
        engine = VLLMEngine(
            servers,
            model,
            tokenizer,
            max_length=config.max_prompt_length + config.max_completion_length,
            max_sequences=config.rollout.max_slots,
            transport=settings.transport,
            bucket_bytes=settings.bucket_mib * 2**20,
            checksum=settings.checksum,
            seeds=settings.request_seeds,
            on_failure=lambda: _check_alive(processes),
            on_close=closing.close,
        )
        closing.callback(stack.pop_all().close)
    return engine


def _start(
    config: RLConfig,
    model: Decoder,
    tokenizer: Any,
    logs: Path,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> list[ServerProcess]:
    """Starts servers side by side and waits for all; ``stack`` ends them."""
    settings = config.rollout.vllm
    folder = Path(tempfile.mkdtemp(prefix="jaxrft-vllm-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    # Only to look for stop texts: requests and answers are tokens.
    served = tokenizer if config.rollout.stop else None
    write_model_folder(folder, model, served, config.model.dtype)
    processes = []
    for number in range(settings.servers):
        options = server_options(config, folder, served is not None, number)
        name = f"vllm server {number}"
        processes.append(ServerProcess(options, logs / f"vllm-{number}.log", name))
        stack.callback(processes[-1].stop)
        say(f"{name}: starting, log in {processes[-1].log}")
    for process in processes:
        process.wait(settings.startup_seconds, say)
        process.follow(say)
    return processes


def _check_alive(processes: Sequence[ServerProcess]) -> None:
    for process in processes:
        process.check_alive()


def server_options(config: RLConfig, folder: Path, tokenizer: bool, number: int) -> ServerOptions:
    """What one of the run's servers is started with."""
    settings, rollout = config.rollout.vllm, config.rollout
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and set(_devices(config)) & set(_own_gpus()):
        check_shares(config.parallel.memory_fraction, settings.gpu_memory)
    share = settings.tensor_parallel
    devices = _devices(config) if on_gpu or settings.devices is not None else None
    return ServerOptions(
        model=folder,
        python=os.path.expanduser(settings.python) if settings.python else sys.executable,
        port=free_port() if settings.port is None else settings.port + number,
        dtype=config.model.dtype,
        max_length=config.max_prompt_length + config.max_completion_length,
        max_sequences=rollout.max_slots,
        logprobs_mode=_mode(config),
        tokenizer=tokenizer,
        tensor_parallel=share,
        devices=None if devices is None else tuple(devices[number * share : (number + 1) * share]),
        gpu_memory=settings.gpu_memory,
        cpu_cache_gib=settings.cpu_cache_gib,
        cpu_cores=None if on_gpu else cpu_cores(number, settings.servers, share),
        sleep=settings.sleep,
        eager=settings.eager,
        more=tuple(settings.arguments),
    )


def _devices(config: RLConfig) -> list[str]:
    """GPUs of all servers, as CUDA_VISIBLE_DEVICES names them."""
    settings = config.rollout.vllm
    if settings.devices is not None:
        return [str(number) for number in settings.devices]
    wanted, own = settings.servers * settings.tensor_parallel, _own_gpus()
    if wanted > len(own):
        raise ConfigError(
            f"rollout.vllm.servers: {settings.servers} servers of {settings.tensor_parallel} GPUs take more than the "
            f"{len(own)} that the trainer has; lower them, or name others in rollout.vllm.devices"
        )
    return own[:wanted]


def _own_gpus() -> list[str]:
    """The trainer's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    ordinals = [device.local_hardware_id for device in jax.local_devices()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    return [names[ordinal] if names else str(ordinal) for ordinal in ordinals]


def check_shares(trainer: float | None, server: float) -> None:
    """Refuses shares of a GPU's memory that do not fit together; JAX takes its own at its start and keeps it.

    Raises:
        ConfigError: they do not; it names shares that do.
    """
    if trainer is None:
        raise ConfigError(
            "parallel.memory_fraction: got None, but the vLLM server shares the trainer's GPUs; set the trainer's "
            f"share of their memory, such as {0.9 - server:.2g} beside rollout.vllm.gpu_memory={server}"
        )
    if trainer + server > 0.95:
        raise ConfigError(
            f"rollout.vllm.gpu_memory: {server} of a GPU's memory for the server and {trainer} for the trainer "
            "(parallel.memory_fraction) leave too little for the programs themselves; together at most 0.95"
        )


def _mode(config: RLConfig) -> wire.LogprobsMode:
    """What servers have to report so that most can be known of the completions that are trained on."""
    return wire.mode_for([config.temperature, config.rollout.first_token_temperature or config.temperature])


def _where(server: Server) -> str:
    devices = [worker["device"] for worker in server.workers]
    return "a CPU" if devices[0] == "cpu" else f"{len(devices)} GPUs" if len(devices) > 1 else "a GPU"
