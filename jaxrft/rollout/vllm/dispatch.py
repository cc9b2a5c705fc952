"""Requests spread over servers, as many at a time as they take."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx

from jaxrft.rollout.errors import EngineError

# A request that failed for want of a connection is tried once more: its seed gives the same completions.
ATTEMPTS = 2
# So long at most until somebody who waits for a long answer is heard, by Ctrl-C for instance.
WAIT_SECONDS = 1.0
# After so long a request that was told to end is left alone.
END_SECONDS = 30.0

Answer = dict[str, Any]
# A request's place and its answer, or why it failed; None for a worker that has ended.
_Ended = queue.SimpleQueue[tuple[int, Answer | BaseException] | None]


class Generates(Protocol):
    """What a dispatcher needs of a server."""

    name: str

    def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answers a request."""
        ...

    def abort(self) -> None:
        """Ends what is being generated; each request answers with what it has."""
        ...

    def ping(self) -> None:
        """Asks for nothing, so that the server looks at what lies before it."""
        ...


class Dispatcher:
    """Sends requests to the servers that are free, once.

    Each server is kept busy by ``in_flight`` threads that take the next request as soon as they have an answer: the
    faster server gets more, and none is sent more than it can work on.

    Args:
        servers: that take any request.
        in_flight: requests that a server has at a time.
    """

    def __init__(self, servers: Sequence[Generates], in_flight: int):
        self._servers, self._in_flight = servers, in_flight
        self._aborted = threading.Event()

    def run(
        self,
        payloads: Sequence[dict[str, Any]],
        on_answer: Callable[[int, Answer], None] = lambda place, answer: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> list[Answer | None]:
        """The answer to each payload, None where :meth:`abort` came before it was sent.

        Args:
            payloads: bodies of requests.
            on_answer: called with the place of each request that was answered, and the answer; what it raises ends
                the others.
            on_wait: called about once a second while none is; likewise.

        Raises:
            EngineError: a server refused a request, or a request failed twice.
        """
        waiting = deque((place, 1) for place in range(len(payloads)))
        answers: list[Answer | None] = [None] * len(payloads)
        ended: _Ended = queue.SimpleQueue()

        def fail(place: int, error: BaseException) -> None:
            ended.put((place, error))
            # At once: until the caller has heard of it, nobody needs to send more.
            self._aborted.set()

        def work(server: Generates) -> None:
            while not self._aborted.is_set():
                try:
                    place, attempt = waiting.popleft()
                except IndexError:
                    break
                try:
                    ended.put((place, server.generate(payloads[place])))
                except httpx.TransportError as error:
                    # What took too long once would again.
                    if attempt < ATTEMPTS and not isinstance(error, httpx.TimeoutException):
                        waiting.append((place, attempt + 1))
                    else:
                        fail(place, _gave_up(server, error))
                except BaseException as error:
                    fail(place, error)
            ended.put(None)

        def answered(place: int, answer: Answer) -> None:
            answers[place] = answer
            on_answer(place, answer)

        count = min(self._in_flight, -(-len(payloads) // len(self._servers)))
        threads = [
            threading.Thread(target=work, args=(server,), name=f"{server.name} {i}", daemon=True)
            for i in range(count)
            for server in self._servers
        ]
        for thread in threads:
            thread.start()
        try:
            self._collect(len(payloads), len(threads), ended, answered, on_wait)
        except BaseException:
            self.abort()
            raise
        finally:
            self._join(threads)
        return answers

    def abort(self) -> None:
        """Ends what runs: requests that are under way answer with what they have, the others are not sent."""
        self._aborted.set()
        self._end_requests()

    def _end_requests(self) -> None:
        for server in self._servers:
            try:
                server.abort()
            except EngineError:
                # It is gone, and with it its requests.
                continue

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        """Waits for the threads; where they were told to end, not for a server that does not."""
        deadline = None
        for thread in threads:
            while thread.is_alive():
                thread.join(WAIT_SECONDS)
                if not (thread.is_alive() and self._aborted.is_set()):
                    continue
                deadline = deadline or time.monotonic() + END_SECONDS
                if time.monotonic() > deadline:
                    return
                # It may have been on its way to the server when that was told to end all.
                self._end_requests()

    def _collect(
        self,
        requests: int,
        workers: int,
        ended: _Ended,
        on_answer: Callable[[int, Answer], None],
        on_wait: Callable[[], None],
    ) -> None:
        """Waits until every request has an answer, or no worker is left."""
        while requests and workers:
            try:
                outcome = ended.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                on_wait()
                # Seen: a server that had missed an answer of its engine stood still until it was asked for something;
                # and another that did so for twenty minutes, though it was asked whether it was well each second.
                for server in self._servers:
                    server.ping()
                continue
            if outcome is None:
                workers -= 1
                continue
            place, answer = outcome
            if isinstance(answer, BaseException):
                raise answer
            requests -= 1
            on_answer(place, answer)


def _gave_up(server: Generates, error: httpx.TransportError) -> EngineError:
    if isinstance(error, httpx.TimeoutException):
        return EngineError(
            f"{server.name}: a request took longer than rollout.vllm.request_seconds; raise it, or ask for less at once"
        )
    return EngineError(f"{server.name}: the connection broke off twice ({type(error).__name__}): does it still run?")
