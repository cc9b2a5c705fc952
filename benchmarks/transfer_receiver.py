"""Stands for a server's worker where a transfer is measured: takes every bucket into memory of its own.

``python transfer_receiver.py DEVICE`` (cpu, or the number of a GPU), with jaxrft/rollout/server_side on the path. It
needs torch, neither JAX nor vLLM. Each line of its input is a request, ``{"do": ..., "with": {...}}``; it answers each
with a line.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import zlib
from typing import Any

import torch
from jaxrft_memory import open_memory


class Receiver:
    """What a worker does, but for filling a model: one copy of every bucket on its own device."""

    def __init__(self, device: str):
        self._device = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(device))
        self._memory: Any = None
        self._bytes = self._tensors = 0

    def describe(self) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        uuid = str(torch.cuda.get_device_properties(self._device).uuid) if on_gpu else "cpu"
        return {"host": socket.gethostname(), "device": uuid, "torch": torch.__version__}

    def open(self, memory: dict[str, Any]) -> None:
        self._memory = open_memory(memory, self._device, 0)
        self._target = torch.zeros(memory["slot_bytes"], dtype=torch.uint8, device=self._device)

    def begin(self) -> None:
        self._bytes = self._tensors = 0

    def load(self, bucket: dict[str, Any]) -> dict[str, Any]:
        """Seconds of reading; a broadcast's include the wait for it."""
        start = time.perf_counter()
        target = self._target[: bucket["bytes"]]
        target.copy_(self._memory.read(bucket["slot"], bucket["bytes"]))
        if target.is_cuda:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        if bucket["checksum"] is not None and bucket["checksum"] != zlib.crc32(target.cpu().numpy()):
            return {"error": "what came is not what was sent"}
        self._bytes += bucket["bytes"]
        self._tensors += len(bucket["tensors"])
        return {"seconds": seconds}

    def finish(self, tensors: int) -> dict[str, Any]:
        if tensors != self._tensors:
            return {"error": f"{self._tensors} tensors came of {tensors}"}
        return {"bytes": self._bytes}

    def release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


def main() -> None:
    receiver = Receiver(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(receiver, request["do"])(**request["with"]) or {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
