"""The trainer's end of the process in transfer_receiver.py."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.vllm.options import SERVER_SIDE

PROGRAM = Path(__file__).resolve().parent / "transfer_receiver.py"


class StandIn:
    """Takes weights as a server does (:class:`jaxrft.rollout.transfer.send.Receiver`).

    Args:
        python: interpreter that has torch.
        device: cpu, or the number of a GPU.

    Attributes:
        workers: what the process says of itself.
        receive_seconds: inside the process, of the transfer under way or the last.
        received_bytes: of the last transfer.
    """

    name = "stand-in"

    def __init__(self, python: str, device: str):
        dropped = ("PYTHONHOME", "VIRTUAL_ENV")
        kept = {n: v for n, v in os.environ.items() if n not in dropped and not n.startswith(("JAX_", "XLA_"))}
        self._process = subprocess.Popen(
            [python, str(PROGRAM), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | {"PYTHONPATH": str(SERVER_SIDE)},
        )
        self.receive_seconds, self.received_bytes = 0.0, 0
        try:
            self.workers = [self._ask("describe")]
        except BaseException:
            self.close()
            raise

    def check(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """It has room for everything."""
        return [{"problems": [], "taken": [math.prod(shape) for _, shape in manifest["tensors"]]}]

    def open(self, memory: dict[str, Any]) -> None:
        """Opens what a transport described."""
        self._ask("open", memory=memory)

    def begin(self) -> None:
        """Starts to count."""
        self.receive_seconds = 0.0
        self._ask("begin")

    def load(self, bucket: dict[str, Any]) -> None:
        """Takes a bucket."""
        self.receive_seconds += self._ask("load", bucket=bucket)["seconds"]

    def finish(self, tensors: int, version: int) -> None:
        """Sees that all tensors came."""
        self.received_bytes = self._ask("finish", tensors=tensors)["bytes"]

    def release(self, sender: str) -> None:
        """Lets go of what it opened."""
        self._ask("release")

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": what, "with": arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "the process has ended: does its Python have torch?"}
        if "error" in answer:
            raise EngineError(f"{self.name}: {what}: {answer['error']}")
        return answer
