"""One vLLM server, as the trainer talks to it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx

from jaxrft.config import ConfigError
from jaxrft.rollout.errors import EngineError

PROTOCOL = 1
# Tried with our tests; others are let through with a word about it.
TESTED_VERSIONS = ("0.24.0", "0.32.0")
# A server that is busy may take its time to answer; one that is gone refuses at once.
CONTROL_SECONDS = 600.0
# Who aborts does not want to wait.
ABORT_SECONDS = 10.0
VERSION_HEADERS = ("x-jaxrft-version-before", "x-jaxrft-version")


class Server:
    """A server that runs; it takes weights (:class:`jaxrft.rollout.transfer.send.Receiver`) and generates.

    Args:
        url: where it listens.
        key: API key; None: it asks for none.
        name: for messages.
        request_seconds: that a request may take.

    Attributes:
        vllm_version: of the package that it runs.
        workers: what each of its workers says of itself.

    Raises:
        EngineError: nothing answers at ``url``.
        ConfigError: what answers is not a server of ours, or wants another key.
    """

    def __init__(self, url: str, key: str | None, name: str, request_seconds: float):
        self.url, self.name = url.rstrip("/"), name
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No proxy stands between: what the environment says of proxies is for other hosts.
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=10.0),
            # Given up before the server does: it closes what has been idle for five seconds.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0),
            trust_env=False,
        )
        # What gave its memory back, and the version that is served when all of it is there again.
        self._asleep: set[str] = set()
        self._served: int | None = None
        self._request_timeout = httpx.Timeout(request_seconds, connect=10.0)
        try:
            self.vllm_version = self._greet()
            self.workers = self._rpc("jaxrft_describe")
            self._paths = self._ask("GET", "/openapi.json").get("paths", {})
        except BaseException:
            self.close()
            raise

    @property
    def stamps_versions(self) -> bool:
        """Whether the server itself says which weights each token came from."""
        return "/update_weight_version" in self._paths

    @property
    def sleeps(self) -> bool:
        """Whether it can give its GPU's memory back."""
        return bool(self.workers[0]["sleep"])

    # ------------------------------------------------------------------ weights

    def check(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """What its workers would do with the tensors of a manifest."""
        return self._rpc("jaxrft_check", manifest)

    def open(self, memory: dict[str, Any]) -> None:
        """Opens what a transport described."""
        self._rpc("jaxrft_open", memory)

    def begin(self) -> None:
        """Refuses to generate from here on, and waits for what is being generated."""
        self._served = None
        self._ask("POST", "/jaxrft/state", json={"status": "loading"})
        self._ask("POST", "/pause", params={"mode": "wait"})
        self._rpc("jaxrft_begin")

    def load(self, bucket: dict[str, Any]) -> None:
        """Takes a bucket."""
        self._rpc("jaxrft_load", bucket)

    def finish(self, tensors: int, version: int) -> None:
        """Takes the new weights into use, and generates again, where its caches are there."""
        self._rpc("jaxrft_finish", tensors)
        if self.stamps_versions:
            self._ask("POST", "/update_weight_version", json={"new_version": str(version)})
        self._served = version
        self._open()

    def _open(self) -> None:
        """Lets requests in, where weights and caches are whole."""
        if self._asleep or self._served is None:
            return
        self._ask("POST", "/reset_prefix_cache")
        self._ask("POST", "/resume")
        self._ask("POST", "/jaxrft/state", json={"status": "ready", "version": self._served})

    def release(self, sender: str) -> None:
        """Lets go of what it opened for a sender, where it still runs."""
        with contextlib.suppress(EngineError):
            self._rpc("jaxrft_close", sender, timeout=ABORT_SECONDS)

    def state(self) -> dict[str, Any]:
        """``status`` (empty, loading, ready) and ``version`` of its weights."""
        return self._ask("GET", "/jaxrft/state")

    # ------------------------------------------------------------------ generation

    def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answers one request; ``versions`` in the answer are those before and after it.

        Raises:
            EngineError: the server refused or failed.
            httpx.TransportError: it is gone, or took too long.
        """
        reply = self._http.post("/inference/v1/generate", json=payload, timeout=self._request_timeout)
        if reply.status_code != 200:
            raise EngineError(f"{self.name}: refused a request ({reply.status_code}): {_reason(reply)}")
        try:
            answer = reply.json()
        except ValueError as error:
            raise EngineError(f"{self.name}: its answer is no JSON: {reply.text[:100]!r}") from error
        return {**answer, "versions": [reply.headers.get(header) for header in VERSION_HEADERS]}

    def abort(self) -> None:
        """Ends what is being generated; each request answers with what it has."""
        self._ask("POST", "/pause", params={"mode": "abort"}, timeout=ABORT_SECONDS)
        self._ask("POST", "/resume", timeout=ABORT_SECONDS)

    def ping(self) -> None:
        """Asks for nothing of use, so that the server wakes up; whether it answers is for others to find out.

        The question is one for the engine's process: the server's own would leave what lies between these two as it is.
        """
        with contextlib.suppress(httpx.TransportError):
            self._http.get("/is_sleeping", timeout=ABORT_SECONDS)

    def sleep(self, level: int) -> None:
        """Gives memory back: caches (1), weights too (2)."""
        self._asleep = {"weights", "kv_cache"}
        if level == 2:
            self._served = None
        self._ask("POST", "/jaxrft/state", json={"status": "asleep"})
        self._ask("POST", "/sleep", params={"level": level})

    def wake(self, tag: str) -> None:
        """Takes memory back for ``weights`` or ``kv_cache``."""
        self._ask("POST", "/wake_up", params={"tags": tag})
        self._asleep.discard(tag)
        self._open()

    def close(self) -> None:
        """Ends the connections; the server goes on."""
        self._http.close()

    # ------------------------------------------------------------------ wire

    def _greet(self) -> str:
        try:
            state = self._ask("GET", "/jaxrft/state")
        except EngineError as error:
            if isinstance(error.__cause__, httpx.TransportError):
                raise
            if "Unauthorized" in str(error):
                raise ConfigError(
                    f"{self.name}: asks for another API key; put the server's into JAXRFT_VLLM_API_KEY"
                ) from error
            raise ConfigError(f"{self.name}: {_NOT_OURS}") from error
        if state.get("protocol") != PROTOCOL:
            raise ConfigError(f"{self.name}: {_NOT_OURS}")
        return state["vllm"]

    def _rpc(self, method: str, argument: Any = None, **options: Any) -> list[dict[str, Any]]:
        arguments = [] if argument is None else [json.dumps(argument)]
        answer = self._ask("POST", "/collective_rpc", json={"method": method, "args": arguments}, **options)
        workers = answer.get("results", [])
        for worker in workers:
            if "error" in worker:
                raise EngineError(f"{self.name}: {method.removeprefix('jaxrft_')}: {worker['error']}")
        return workers

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise EngineError(
                f"{self.name}: no answer from {self.url} ({type(error).__name__}): does it still run?"
            ) from error
        if reply.status_code != 200:
            raise EngineError(f"{self.name}: {path} failed ({reply.status_code}): {_reason(reply)}")
        try:
            return reply.json()
        except ValueError:
            return {}


_NOT_OURS = (
    "not a server that takes our weights; start it with jaxrft's jaxrft_server.py (see docs/vllm.md), of this version"
)


def _reason(reply: httpx.Response) -> str:
    try:
        content = reply.json()
        error = content.get("error", content)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = reply.text
    return str(text).strip()[:300]
