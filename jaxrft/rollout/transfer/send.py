"""One transfer: the same steps for every server and every transport."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import jax
import numpy as np

from jaxrft.models.names import Path
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.transfer.export import Exporter
from jaxrft.rollout.transfer.plan import Bucket, manifest
from jaxrft.rollout.transfer.transport import Transport


class Receiver(Protocol):
    """A server that takes weights; each method returns one answer a worker, or raises EngineError."""

    name: str

    def check(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """What its workers would do with the tensors of a manifest."""
        ...

    def open(self, memory: dict[str, Any]) -> None:
        """Opens what a transport described."""
        ...

    def begin(self) -> None:
        """Refuses to generate from here on, and waits for what is being generated."""
        ...

    def load(self, bucket: dict[str, Any]) -> None:
        """Takes a bucket."""
        ...

    def finish(self, tensors: int, version: int) -> None:
        """Takes the new weights into use, and generates again."""
        ...

    def release(self, sender: str) -> None:
        """Lets go of what it opened for a sender, where it still runs."""
        ...


@dataclasses.dataclass(frozen=True)
class Report:
    """What a transfer took.

    Attributes:
        seconds: of the whole, from the first pause to the last resumption.
        bytes: sent to each server.
        buckets: that they were sent in.
    """

    seconds: float
    bytes: int
    buckets: int


class Sender:
    """Sends weights to servers.

    Args:
        receivers: the servers.
        transport: how bytes get there; opened here, closed by :meth:`close`.
        buckets: what is sent.
        exporter: packs them.
        dtype: of the packed arrays.
        checksum: whether every bucket is checked on arrival.

    Raises:
        EngineError: names, shapes or types do not cover a server's model, or it cannot open the transport.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        transport: Transport,
        buckets: Sequence[Bucket],
        exporter: Exporter,
        dtype: str,
        checksum: bool = False,
    ):
        self._receivers, self.transport, self._buckets = receivers, transport, buckets
        self._exporter, self._dtype, self._checksum = exporter, dtype, checksum
        # A server takes weights from one sender at a time, and tells them apart by this.
        self._name = secrets.token_hex(8)
        self._threads = ThreadPoolExecutor(len(receivers), thread_name_prefix="weights")
        try:
            self._check()
            opening = [
                self._threads.submit(receiver.open, {"sender": self._name, **transport.describe(place)})
                for place, receiver in enumerate(receivers)
            ]
            self._beside(transport.connect, opening)
            _all(opening)
            transport.opened()
        except BaseException:
            self.close()
            raise

    def send(self, values: Mapping[Path, jax.Array], version: int) -> Report:
        """Replaces the weights of all servers.

        Where it fails, servers are left that refuse to generate until a transfer succeeds.

        Args:
            values: parameters by path.
            version: that completions will carry.
        """
        start = time.perf_counter()
        self._everywhere(lambda receiver: receiver.begin())
        under_way: list[list[Future]] = [[] for _ in range(self.transport.slots)]
        sent = 0
        try:
            for number, bucket in enumerate(self._buckets):
                slot = number % self.transport.slots
                _all(under_way[slot])
                packed = self._exporter.pack(bucket, values)
                under_way[slot] = self._hand_over(slot, bucket, packed)
                sent += packed.nbytes
        finally:
            # Also where one failed: nobody may write into a slot that a server still reads.
            _wait([future for slot in under_way for future in slot])
        _all([future for slot in under_way for future in slot])
        tensors = sum(len(bucket.entries) for bucket in self._buckets)
        self._everywhere(lambda receiver: receiver.finish(tensors, version))
        return Report(time.perf_counter() - start, sent, len(self._buckets))

    def close(self) -> None:
        """Lets go of the transport."""
        # Not waited for: a server that hangs would hold everything up.
        self._threads.shutdown(wait=False, cancel_futures=True)
        for receiver in self._receivers:
            receiver.release(self._name)
        self.transport.close()

    def _hand_over(self, slot: int, bucket: Bucket, packed: jax.Array) -> list[Future]:
        if self.transport.put_first:
            self.transport.put(slot, packed)
        checksum = zlib.crc32(np.asarray(packed).view(np.uint8).data) if self._checksum else None
        described = {"slot": slot, "bytes": packed.nbytes, "dtype": self._dtype, "tensors": bucket.places()}
        described |= {"checksum": checksum, "sender": self._name}
        futures = [self._threads.submit(receiver.load, described) for receiver in self._receivers]
        if not self.transport.put_first:
            self._beside(lambda: self.transport.put(slot, packed), futures)
        return futures

    def _beside(self, do: Callable[[], None], futures: Sequence[Future]) -> None:
        """Does what waits for the servers; where one of them fails it would wait for ever, and is given up.

        Raises:
            EngineError: a server failed.
        """
        if self.transport.put_first:
            do()
            return
        own: Future = Future()
        # Not one of the threads that are waited for at the end.
        threading.Thread(target=_into, args=(own, do), name="transport", daemon=True).start()
        done, _ = wait({own, *futures}, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            self.transport.close()
        _all(list(done))

    def _check(self) -> None:
        wanted = manifest(self._buckets, self._dtype)
        for receiver in self._receivers:
            problems = coverage_problems(wanted["tensors"], receiver.check(wanted))
            if problems:
                more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
                raise EngineError(
                    f"{receiver.name}: the trainer's tensors do not make up its model: {'; '.join(problems[:5])}{more}."
                    " Nothing was sent. Does it serve the same model, in the same type?"
                )

    def _everywhere(self, do: Callable[[Receiver], None]) -> None:
        futures = [self._threads.submit(do, receiver) for receiver in self._receivers]
        _wait(futures)
        _all(futures)


def coverage_problems(tensors: Sequence[tuple[str, Sequence[int]]], answers: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps tensors from filling a model that is spread over several workers.

    Args:
        tensors: names and shapes.
        answers: each worker's: its own ``problems``, and how many elements of each tensor it has ``taken``.
    """
    problems = [problem for answer in answers for problem in answer["problems"]]
    if problems:
        return sorted(set(problems))
    taken = np.sum([answer["taken"] for answer in answers], axis=0)
    for (name, shape), elements in zip(tensors, taken):
        if elements == 0:
            problems.append(f"{name} has no place in it")
        elif elements < int(np.prod(shape)):
            problems.append(f"{name} of shape {list(shape)} is too large: {elements} of its elements are taken")
    return problems


def _into(future: Future, do: Callable[[], None]) -> None:
    try:
        do()
        future.set_result(None)
    except BaseException as error:
        future.set_exception(error)


def _wait(futures: Sequence[Future]) -> None:
    for future in futures:
        future.exception()


def _all(futures: Sequence[Future]) -> None:
    """Raises what any of them raised."""
    for future in futures:
        future.result()
