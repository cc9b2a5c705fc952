"""Whether servers are what an engine needs: alike, and fit for its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from jaxrft.config import ConfigError
from jaxrft.rollout.vllm.server import Server
from jaxrft.rollout.vllm.wire import LogprobsMode


def agreed(servers: Sequence[Server]) -> dict[str, Any]:
    """What all workers say alike."""
    first = servers[0].workers[0]
    for server in servers:
        for worker in server.workers:
            for field in ("dtype", "logprobs_mode", "model_type", "tied", "tokenizer"):
                if worker[field] != first[field]:
                    raise ConfigError(
                        f"rollout.vllm.urls: {field} is {worker[field]} at {server.name}, {first[field]} at "
                        f"{servers[0].name}; start all servers alike"
                    )
    return first


def check_serves(name: str, worker: dict[str, Any], max_length: int) -> None:
    """Refuses servers that cannot be filled with this model, or do not say what is needed."""
    if worker["data_parallel"] != 1:
        raise ConfigError(
            f"{name}: has {worker['data_parallel']} data parallel copies of the model, of which only one would be "
            "heard of; start as many servers instead"
        )
    if worker["logprobs_mode"] not in get_args(LogprobsMode):
        raise ConfigError(
            f"{name}: reports {worker['logprobs_mode']}; start it with --logprobs-mode "
            f"{' or '.join(get_args(LogprobsMode))}"
        )
    if worker["max_model_len"] < max_length:
        raise ConfigError(
            f"{name}: takes {worker['max_model_len']} tokens of prompt and completion together, the run needs "
            f"{max_length} (max_prompt_length + max_completion_length); start it with --max-model-len {max_length}"
        )
    if worker["tied"] and worker["device"] == "cpu":
        raise ConfigError(
            f"{name}: ties its embeddings, which cannot be renewed on a CPU; start it with "
            """--hf-overrides '{"tie_word_embeddings": false}'"""
        )
