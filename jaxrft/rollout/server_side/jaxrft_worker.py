"""Takes weights inside a vLLM worker: ``--worker-extension-cls jaxrft_worker.WeightReceiver``.

The trainer calls these methods by ``/collective_rpc``: ``jaxrft_describe`` and ``jaxrft_check`` once, ``jaxrft_open``
once, then for each transfer ``jaxrft_begin``, ``jaxrft_load`` for every bucket, ``jaxrft_finish``. Arguments are JSON
texts; each answers with a dict that has ``error`` where something went wrong (an exception could end the server).
torch and vLLM are imported where they are used, so that this module can be imported without them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import socket
import zlib
from typing import Any

from jaxrft_coverage import Coverage
from jaxrft_memory import open_memory

PROTOCOL = 1


def answered(method: Any) -> Any:
    """Turns what a method raises into an answer."""

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> dict[str, Any]:
        try:
            return method(self, *args) or {}
        except Exception as error:
            lines = str(error).strip().splitlines()
            return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}

    return call


class WeightReceiver:
    """Mixed into vLLM's worker class; its attributes all start with ``jaxrft_``."""

    jaxrft_memory: Any = None
    jaxrft_sender: str | None = None
    jaxrft_loading: bool = False
    jaxrft_seen: set[str] | None = None

    @answered
    def jaxrft_describe(self: Any) -> dict[str, Any]:
        """Which part of which model this worker holds, and where."""
        import torch

        config, device = self.vllm_config, self.device
        on_gpu = device.type == "cuda"
        hf_config = config.model_config.hf_text_config
        return {
            "protocol": PROTOCOL,
            "rank": self.rank,
            "world_size": config.parallel_config.world_size,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "data_parallel": config.parallel_config.data_parallel_size,
            "device": str(torch.cuda.get_device_properties(device).uuid) if on_gpu else "cpu",
            "host": socket.gethostname(),
            "process": os.getpid(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "logprobs_mode": str(
                getattr(config.model_config.logprobs_mode, "value", config.model_config.logprobs_mode)
            ),
            "model_type": hf_config.model_type,
            "tokenizer": not config.model_config.skip_tokenizer_init,
            "sleep": bool(getattr(config.model_config, "enable_sleep_mode", False)),
            "tied": bool(getattr(hf_config, "tie_word_embeddings", False)),
        }

    @answered
    def jaxrft_check(self: Any, manifest: str) -> dict[str, Any]:
        """Whether tensors of these names, shapes and types would fill the model; its weights are not touched.

        Args:
            manifest: ``{"dtype": ..., "tensors": [[name, shape], ...]}``.
        """
        return Coverage(self._jaxrft_shapes()).examine(**json.loads(manifest))

    def _jaxrft_shapes(self: Any) -> Any:
        """The model without memory: the one that runs may have packed its weights in ways of its own."""
        import torch
        from vllm.model_executor.model_loader.utils import initialize_model

        config = copy.copy(self.vllm_config)
        # Layers enter themselves here by name, each once.
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        before = torch.get_default_dtype()
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("meta"):
                return initialize_model(vllm_config=config)
        finally:
            torch.set_default_dtype(before)

    @answered
    def jaxrft_open(self: Any, memory: str) -> None:
        """Opens the memory that the buckets of a sender will lie in; the one before is let go of."""
        described = json.loads(memory)
        self._jaxrft_let_go()
        self.jaxrft_memory = open_memory(described, self.device, self.rank)
        self.jaxrft_sender = described["sender"]

    @answered
    def jaxrft_close(self: Any, sender: str) -> None:
        """Lets go of a sender's memory; another's is kept."""
        if json.loads(sender) == self.jaxrft_sender:
            self._jaxrft_let_go()

    def _jaxrft_let_go(self: Any) -> None:
        memory, self.jaxrft_memory, self.jaxrft_sender = self.jaxrft_memory, None, None
        if memory is not None:
            memory.close()

    @answered
    def jaxrft_begin(self: Any) -> None:
        """Starts a transfer, also after one that was broken off."""
        reload = _reload()
        model = self.model_runner.model
        if self.jaxrft_loading and reload is not None:
            # What the transfer before left half done goes: layers that it did not fill take their old weights back.
            reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
        self.jaxrft_loading, self.jaxrft_seen = True, set()
        if reload is not None:
            reload.initialize_layerwise_reload(model)

    @answered
    def jaxrft_load(self: Any, bucket: str) -> dict[str, Any]:
        """Takes the tensors of one bucket.

        Args:
            bucket: ``{"sender": ..., "slot": ..., "bytes": ..., "dtype": ..., "tensors": [[name, shape, first element],
                ...], "checksum": CRC-32 or null}``.
        """
        import torch

        if not self.jaxrft_loading or self.jaxrft_seen is None:
            return {"error": "jaxrft_load came without jaxrft_begin"}
        described = json.loads(bucket)
        if described["sender"] != self.jaxrft_sender:
            return {"error": "another trainer sends weights to this server: one at a time"}
        data = self.jaxrft_memory.read(described["slot"], described["bytes"])
        if described["checksum"] is not None:
            found = zlib.crc32(data.cpu().numpy())
            if found != described["checksum"]:
                return {"error": f"the bucket has checksum {found} here, {described['checksum']} at the trainer"}
        values = data.view(getattr(torch, described["dtype"]))
        # Copies: vLLM keeps what it is given until it has all of a layer, where that is padded until the very end, and
        # the slot is written again before.
        weights = [
            (name, values[first : first + _elements(shape)].clone().view(shape))
            for name, shape, first in described["tensors"]
        ]
        with torch.no_grad():
            self.model_runner.model.load_weights(weights)
        if data.is_cuda:
            torch.cuda.synchronize(data.device)
        self.jaxrft_seen.update(name for name, *_ in described["tensors"])
        return {"tensors": len(weights)}

    @answered
    def jaxrft_finish(self: Any, count: str) -> dict[str, Any]:
        """Ends a transfer of ``count`` tensors; from here on the model is the new one."""
        import torch

        if self.jaxrft_seen is None or len(self.jaxrft_seen) != int(count):
            return {"error": f"{len(self.jaxrft_seen or ())} tensors came of {count}"}
        reload = _reload()
        if reload is not None:
            with torch.no_grad():
                reload.finalize_layerwise_reload(self.model_runner.model, self.vllm_config.model_config)
        self.jaxrft_loading, self.jaxrft_seen = False, None
        return {}


def _reload() -> Any:
    """vLLM's module for loading weights again, layer by layer; None before it had one."""
    try:
        from vllm.model_executor.model_loader import reload
    except ImportError:
        return None
    return reload


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
