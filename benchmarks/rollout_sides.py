"""The sides of benchmarks/rollout.py: the model for each, and how each generates for the same prompts.

A side is a function of prompts [prompts, prompt length] that generates ``group`` completions of each, all of the full
response length, and returns when they are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import step_shapes
from torch_device import torch_device

from jaxrft import models
from jaxrft.models import Decoder
from jaxrft.rollout import NativeEngine, Request, SamplingParams

Side = Callable[[np.ndarray], None]


def config_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a Qwen2's config.json: a named shape, or one of the given dimensions."""
    if arguments.shape:
        return step_shapes.hf_config(arguments.shape, max(arguments.prompt_length) + max(arguments.response_length))
    return {
        "model_type": "qwen2",
        "vocab_size": arguments.vocab_size,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.intermediate_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def build_model(arguments: argparse.Namespace) -> Decoder:
    types = {"dtype": arguments.dtype, "param_dtype": arguments.param_dtype}
    if arguments.model:
        model = models.load(arguments.model, **types)
    else:
        model = models.from_config(config_fields(arguments), **types)
    model.attention = arguments.attention
    return model


def build_peer(arguments: argparse.Namespace) -> Any | None:
    """The same model for ``transformers.generate``, or None where torch is missing."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    dtype, device = getattr(torch, arguments.dtype), torch_device(jax.default_backend())
    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval().to(device)
    config = AutoConfig.for_model(**config_fields(arguments), bos_token_id=None, eos_token_id=None)
    # A host takes half a minute to draw the weights of 1.5B.
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def engine_side(engine: Any, response_length: int, arguments: argparse.Namespace) -> Side:
    """The native engine, or vLLM's."""
    sampling = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_tokens=response_length,
        ignore_eos=True,
    )

    def run(prompts: np.ndarray) -> None:
        requests = [Request(prompt_ids=prompt.tolist(), n=arguments.group) for prompt in prompts]
        for completion in engine.generate(requests, sampling):
            assert len(completion.token_ids) == response_length

    return run


def native_engine(
    model: Decoder, slots: int, max_length: int, arguments: argparse.Namespace, quantization: Any = "none"
) -> NativeEngine:
    options = {"max_slots": slots, "max_length": max_length, "decode_chunk": arguments.decode_chunk}
    return NativeEngine(model, **options, quantization=quantization)


def transformers_side(peer: Any, response_length: int, arguments: argparse.Namespace) -> Side:
    import torch

    options = {"max_new_tokens": response_length, "min_new_tokens": response_length, "pad_token_id": 0}
    options |= {"num_return_sequences": arguments.group} if arguments.group > 1 else {}
    if arguments.temperature == 0:
        options |= {"do_sample": False}
    else:
        options |= {"do_sample": True, "temperature": arguments.temperature}
        options |= {"top_k": arguments.top_k, "top_p": arguments.top_p}

    def run(prompts: np.ndarray) -> None:
        tokens = torch.tensor(prompts, device=peer.device)
        with torch.no_grad():
            result = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert result.cpu().shape[1] == prompts.shape[1] + response_length

    return run
