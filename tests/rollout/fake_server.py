"""Stands for a vLLM server: takes weights, and generates from a language model of a few lines.

The model knows only the token before: logits are one row of a table. So what a completion's log-probabilities have to
be follows from its tokens alone.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import threading
import zlib
from typing import Any

import numpy as np

from jaxrft.rollout.errors import EngineError

VOCAB = 17
TABLE = np.random.default_rng(5).normal(0, 1.5, (VOCAB, VOCAB))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def logprob(before: int, token: int, temperature: float) -> float:
    """What the trainer would say of a token."""
    return float(log_softmax(TABLE[before] / temperature)[token])


def worker(**changes: Any) -> dict[str, Any]:
    """What a worker on a CPU says of itself."""
    said: dict[str, Any] = {
        "rank": 0, "data_parallel": 1,
        "host": socket.gethostname(), "device": "cpu", "dtype": "float32", "max_model_len": 64,
        "logprobs_mode": "processed_logprobs", "model_type": "qwen2", "sleep": False, "tied": False,
        "tokenizer": True,
    }  # fmt: skip
    return said | changes


class FakeServer:
    """Keeps what it is sent in ``tensors``, the order of what it is asked in ``calls``, bodies in ``payloads``.

    ``fail`` maps the name of a call to an error that its next one raises.
    """

    vllm_version = "0.24.0"

    def __init__(self, name: str = "fake", **described: Any):
        self.name, self.workers = name, [worker(**described)]
        self.calls: list[str] = []
        self.payloads: list[dict[str, Any]] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.fail: dict[str, BaseException] = {}
        self.version: int | None = None
        self._lock = threading.Lock()

    @property
    def sleeps(self) -> bool:
        return bool(self.workers[0]["sleep"])

    def _called(self, call: str) -> None:
        with self._lock:
            self.calls.append(call)
            error = self.fail.pop(call.split()[0], None)
        if error is not None:
            raise error

    # ------------------------------------------------------------------ weights

    def check(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        self._called("check")
        return [{"problems": [], "taken": [math.prod(shape) for _, shape in manifest["tensors"]]}]

    def open(self, memory: dict[str, Any]) -> None:
        self._called("open")
        handle = os.open(memory["path"], os.O_RDONLY)
        self._map = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        os.close(handle)
        self._slot_bytes = memory["slot_bytes"]

    def begin(self) -> None:
        self._called("begin")
        self.tensors = {}

    def load(self, bucket: dict[str, Any]) -> None:
        self._called("load")
        start = bucket["slot"] * self._slot_bytes
        data = self._map[start : start + bucket["bytes"]]
        if bucket["checksum"] not in (None, zlib.crc32(data)):
            raise EngineError(f"{self.name}: load: another checksum")
        assert bucket["dtype"] == "float32"
        values = np.frombuffer(data, np.float32)
        for name, shape, first in bucket["tensors"]:
            self.tensors[name] = values[first : first + math.prod(shape)].reshape(shape)

    def finish(self, tensors: int, version: int) -> None:
        self._called("finish")
        assert len(self.tensors) == tensors
        self.version = version

    def release(self, sender: str) -> None:
        self._called("release")

    # ------------------------------------------------------------------ the rest

    def sleep(self, level: int) -> None:
        self._called(f"sleep {level}")

    def wake(self, tag: str) -> None:
        self._called(f"wake {tag}")

    def abort(self) -> None:
        self._called("abort")

    def ping(self) -> None:
        """Asked for now and then, as time goes by: not among the calls."""

    def close(self) -> None:
        self._called("close")

    def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._called("generate")
        self.payloads.append(payload)
        params = payload["sampling_params"]
        choices = [self._choice(i, payload["token_ids"][-1], params) for i in range(params["n"])]
        # In no order: the place of each stands in it.
        return {"choices": choices[::-1], "versions": [str(self.version), str(self.version)]}

    def _choice(self, index: int, before: int, params: dict[str, Any]) -> dict[str, Any]:
        rng, greedy = np.random.default_rng(params.get("seed", 0) + index), params["temperature"] == 0
        raw = greedy or self.workers[0]["logprobs_mode"] == "raw_logprobs"
        tokens: list[int] = []
        content: list[dict[str, float]] = []
        reason = "length"
        while len(tokens) < params["max_tokens"]:
            logprobs = log_softmax(TABLE[before] / (params["temperature"] or 1))
            allowed = np.ones(VOCAB, bool)
            if len(tokens) < params["min_tokens"]:
                allowed[params["stop_token_ids"]] = False
            drawn = logprobs + (0 if greedy else rng.gumbel(size=VOCAB))
            token = int(np.argmax(np.where(allowed, drawn, -np.inf)))
            tokens.append(token)
            content.append({"logprob": log_softmax(TABLE[before])[token] if raw else logprobs[token]})
            before = token
            if token in params["stop_token_ids"]:
                reason = "stop"
                break
        return {"index": index, "token_ids": tokens, "logprobs": {"content": content}, "finish_reason": reason}
