"""What benchmarks/weight_transfer.py measures: updates of one model, and a plain copy of the same bytes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import step_shapes
from flax import nnx
from transfer_stand_in import StandIn
from vllm_peer import vllm_engine

from jaxrft import models
from jaxrft.models.checkpoint import tensor_table
from jaxrft.rollout.transfer.choice import choose, gpus_of, make_transport
from jaxrft.rollout.transfer.export import Exporter
from jaxrft.rollout.transfer.plan import make_buckets, make_entries
from jaxrft.rollout.transfer.send import Sender

LENGTH = 256
GOAL_BYTES = 3e9


def random_model(size: str, dtype: str) -> tuple[models.Decoder, Any]:
    """An abstract Qwen2 of a shape, and a state of random weights in ``dtype`` for it."""
    config = step_shapes.hf_config(size, LENGTH)
    model = nnx.eval_shape(lambda: models.from_config(config))
    _, state = nnx.split(model)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return model, jax.tree.unflatten(structure, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves)])


class Parts:
    """Seconds of an update by what they were spent on; parts run side by side, so that their sum may be larger."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, sender: Sender) -> None:
        """From here on counts what a sender does."""
        pack = sender._exporter.pack
        # Whatever comes next waits for the packed bucket anyway.
        sender._exporter.pack = self._timed("pack", lambda *given: jax.block_until_ready(pack(*given)))
        sender.transport.put = self._timed("put", sender.transport.put)
        for receiver in sender._receivers:
            for name in ("begin", "load", "finish"):
                setattr(receiver, name, self._timed(name, getattr(receiver, name)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call


def stand_in_case(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Updates of the process that stands for a server; a first one is checked bucket by bucket."""
    model, state = random_model(size, arguments.param_dtype)
    values = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
    like = next(iter(values.values()))
    gpus = gpus_of(sorted(like.devices(), key=lambda device: device.id))
    # A broadcast goes to another GPU than the one it comes from.
    device = str(jax.local_device_count() - 1 if arguments.transport == "nccl" else 0) if gpus else "cpu"
    receiver = StandIn(arguments.receiver, device)
    with contextlib.closing(receiver):
        workers = [receiver.workers]
        kind = choose(arguments.transport, workers, socket.gethostname(), list(gpus))
        entries = make_entries(tensor_table(model), {path: value.shape for path, value in values.items()})
        itemsize = jnp.dtype(arguments.dtype).itemsize
        buckets = make_buckets(entries, arguments.bucket_mib * 2**20 // itemsize)
        slot_bytes = max(bucket.elements for bucket in buckets) * itemsize

        def sender(checksum: bool) -> Sender:
            transport = make_transport(kind, workers, gpus, slot_bytes)
            return Sender([receiver], transport, buckets, Exporter(like, arguments.dtype), arguments.dtype, checksum)

        with contextlib.closing(sender(checksum=True)) as checked:
            checked.send(values, 0)
        with contextlib.closing(sender(arguments.checksum)) as sending:
            parts = Parts()
            parts.watch(sending)

            def update() -> int:
                sent = sending.send(values, 0)
                parts.seconds["receive"] = receiver.receive_seconds
                return sent.bytes

            measured = measure(update, state, parts, arguments)
        return {
            "transport": kind,
            "tensors": len(entries),
            "buckets": len(buckets),
            **measured,
            "received_bytes": receiver.received_bytes,
            "torch": workers[0][0]["torch"],
        }


def vllm_case(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole updates of a real server, from the pause to its next token."""
    model, state = random_model(size, arguments.param_dtype)
    with vllm_engine(
        arguments.vllm, model, dtype=arguments.dtype, max_length=LENGTH, gpu_memory=arguments.vllm_memory,
        transport=arguments.transport, bucket_bytes=arguments.bucket_mib * 2**20, checksum=arguments.checksum,
    ) as (engine, version):  # fmt: skip
        engine.update_weights(state, 0)
        parts = Parts()
        parts.watch(engine._sender)

        def update() -> int:
            engine.update_weights(state, 0)
            return engine.last_transfer.bytes

        measured = measure(update, state, parts, arguments)
        return {"transport": engine.transport, "vllm": version, "buckets": engine.last_transfer.buckets, **measured}


def measure(update: Callable[[], int], state: Any, parts: Parts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Updates and plain copies of the same parameters in turns, after one of each."""
    sent = jax.tree.map(lambda x: x.astype(arguments.dtype), state)
    copied = sum(x.nbytes for x in jax.tree.leaves(sent))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    jax.block_until_ready(copy(sent))
    size = update()
    seconds, copy_seconds, splits = [], [], []
    for _ in range(arguments.repeats):
        parts.seconds.clear()
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
        splits.append(dict(parts.seconds))
        start = time.perf_counter()
        jax.block_until_ready(copy(sent))
        copy_seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    speed, copy_speed = size / median / 1e9, copied / statistics.median(copy_seconds) / 1e9
    return {
        "bytes": size,
        "seconds": median,
        "update_seconds": seconds,
        "gb_per_second": speed,
        "seconds_per_3_gb": GOAL_BYTES / 1e9 / speed,
        "parts": {name: statistics.median(split[name] for split in splits) for name in splits[0]},
        "copy": {"bytes": copied, "seconds": copy_seconds, "gb_per_second": copy_speed},
        "speed_over_copy": speed / copy_speed,
        "fastest_over_copy": (size / min(seconds)) / (copied / min(copy_seconds)),
    }
