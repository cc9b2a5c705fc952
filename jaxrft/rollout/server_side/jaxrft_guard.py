"""Stands before a vLLM server (``--middleware jaxrft_guard.Guard``): asks for the key, and knows the weights' state.

vLLM's own key guards a part of its routes only, those that replace the model not among them. ``GET /jaxrft/state``
gives the state; the trainer sets it by ``POST``: ``loading`` before the first byte of a transfer, ``ready`` with the
version after the last, ``asleep`` while its memory is given back. Nothing is generated but when it is ``ready``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from typing import Any

PROTOCOL = 1
GENERATING = ("/inference", "/v1/", "/v2/", "/cohere", "/generat", "/invocations", "/score", "/rerank", "/pooling")
# These only say what is served.
TELLING = ("/v1/models",)
WHY = {
    "empty": "no weights have come yet",
    "loading": "a transfer of weights has not been completed",
    "asleep": "its memory is given to training",
}
# Of the weights at the start and at the end of a request.
VERSION_HEADERS = (b"x-jaxrft-version-before", b"x-jaxrft-version")


class Guard:
    """ASGI middleware.

    Args:
        app: the server.
    """

    def __init__(self, app: Any):
        self._app = app
        key = os.environ.get("VLLM_API_KEY")
        self._key = hashlib.sha256(key.encode()).digest() if key else None
        self._status, self._version = "empty", None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers, refuses, or passes on."""
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._allowed(scope):
            await _answer(send, 401, {"error": "Unauthorized: the API key is missing or wrong"})
        elif scope["path"] == "/jaxrft/state":
            await self._state(scope, receive, send)
        elif self._status != "ready" and scope["path"].startswith(GENERATING) and scope["path"] not in TELLING:
            await _answer(send, 503, {"error": f"refused: {WHY[self._status]}"})
        else:
            await self._app(scope, receive, self._stamped(send))

    def _allowed(self, scope: Any) -> bool:
        if self._key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        return secrets.compare_digest(hashlib.sha256(given).digest(), self._key)

    async def _state(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            wanted = json.loads(body)
            self._status, self._version = wanted["status"], wanted.get("version", self._version)
        import vllm

        state = {"protocol": PROTOCOL, "vllm": vllm.__version__, "status": self._status, "version": self._version}
        await _answer(send, 200, state)

    def _stamped(self, send: Any) -> Any:
        before = self._version

        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                values = (str(before).encode(), str(self._version).encode())
                message = {**message, "headers": [*message.get("headers", []), *zip(VERSION_HEADERS, values)]}
            await send(message)

        return stamped


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
