"""Settings that would make a run fit, or that it has room for: each is tried on the memory plan before it is named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from jaxrft.config import RLConfig

Fits = Callable[[RLConfig], bool]
Change = Callable[[RLConfig], RLConfig]


def remedies(config: RLConfig, fits: Fits, group: int, *, offload: bool) -> tuple[str, ...]:
    """Up to three settings, from cheap to dear, each of which alone makes a config fit; else those that do together.

    Args:
        fits: whether a config does.
        group: completions of which a micro-batch holds a multiple.
        offload: whether the host's memory is another than the device's.
    """
    changes = list(_changes(config, group, offload))
    alone: dict[str, str] = {}
    for kind, text, change in changes:
        if kind not in alone and fits(change(config)):
            alone[kind] = f"{text} fits"
    if alone:
        return tuple(list(alone.values())[:3])
    together: dict[str, tuple[str, Change]] = {}
    for kind, text, change in changes:
        # Of one kind the later is the stronger, and replaces the one before.
        together[kind] = (text, change)
        if fits(_applied(config, together)):
            return (f"{' and '.join(text for text, _ in _needed(config, fits, together))} fit together",)
    return ()


def room(config: RLConfig, fits: Fits) -> tuple[str, ...]:
    """The largest micro-batch that a config has room for, where it is larger than its own."""
    if config.batching.tokens_per_device is not None:
        return ()
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    for factor in range(parts, 1, -1):
        larger = with_rows(config, rows * factor) if parts % factor == 0 else None
        if larger is not None and fits(larger):
            return (f"has room for {_rows_text(larger)}",)
    return ()


def with_rows(config: RLConfig, rows: int) -> RLConfig:
    """The same rollouts and optimizer steps in micro-batches of ``rows`` completions a device."""
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = config.steps_per_generation
    return dataclasses.replace(
        config,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=samples // rows,
        steps_per_generation=steps and steps * config.per_device_train_batch_size // rows,
    )


def _applied(config: RLConfig, changes: dict[str, tuple[str, Change]]) -> RLConfig:
    for _, change in changes.values():
        config = change(config)
    return config


def _needed(config: RLConfig, fits: Fits, changes: dict[str, tuple[str, Change]]) -> list[tuple[str, Change]]:
    """The changes without those that are not needed beside the others."""
    for kind in list(changes):
        rest = {other: change for other, change in changes.items() if other != kind}
        if fits(_applied(config, rest)):
            changes = rest
    return list(changes.values())


def _changes(config: RLConfig, group: int, offload: bool) -> Iterator[tuple[str, str, Change]]:
    """Kind, text and effect of each change, from cheap to dear."""

    def memory(**fields: Any) -> Change:
        return lambda c: dataclasses.replace(c, memory=dataclasses.replace(c.memory, **fields))

    settings = config.memory
    if settings.remat in ("none", "save"):
        yield "remat", "memory.remat=full", memory(remat="full")
    if offload and not settings.offload_reference:
        yield "reference", "memory.offload_reference=true", memory(offload_reference=True)
    slots = config.rollout.max_slots
    while slots > 1:
        slots = (slots + 1) // 2
        yield "slots", f"rollout.max_slots={slots}", _with_slots(slots)
    yield from _smaller(config, group)
    if offload and not settings.offload_optimizer:
        yield "optimizer", "memory.offload_optimizer=true", memory(offload_optimizer=True)
    if not settings.scan_layers:
        text = "memory.scan_layers=true with memory.remat=full"
        yield "remat", text, memory(scan_layers=True, remat="full")


def _with_slots(slots: int) -> Change:
    return lambda c: dataclasses.replace(c, rollout=dataclasses.replace(c.rollout, max_slots=slots))


def _smaller(config: RLConfig, group: int) -> Iterator[tuple[str, str, Change]]:
    """Smaller micro-batches."""
    tokens, rows = config.batching.tokens_per_device, config.per_device_train_batch_size
    if tokens is not None:
        least = config.batching.row_length or config.max_prompt_length + config.max_completion_length
        while tokens > least:
            tokens = max(tokens // 2, least)
            yield "rows", f"batching.tokens_per_device={tokens}", _with_tokens(tokens)
        return
    devices = config.parallel.data_devices
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0 and fewer * devices % group == 0:
            yield "rows", _rows_text(with_rows(config, fewer)), functools.partial(with_rows, rows=fewer)


def _with_tokens(tokens: int) -> Change:
    return lambda c: dataclasses.replace(c, batching=dataclasses.replace(c.batching, tokens_per_device=tokens))


def _rows_text(config: RLConfig) -> str:
    steps = f" and steps_per_generation={config.steps_per_generation}" if config.steps_per_generation else ""
    return (
        f"per_device_train_batch_size={config.per_device_train_batch_size} with "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}{steps}"
    )
