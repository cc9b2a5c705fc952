"""The memory plan of a run: what each device will hold, before anything is loaded.

Two phases are compared with the device's memory: the update, with what scores its samples, and the rollout. The
counts are those of ``memory_model``; what else would fit is looked for in ``memory_advice``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import psutil

from jaxrft.config import ConfigError, RLConfig
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import Layout
from jaxrft.parallel.description import GIB
from jaxrft.training.memory_advice import remedies, room
from jaxrft.training.memory_model import Items, rollout_items, state_items, update_items
from jaxrft.training.memory_sizes import Sizes

MIB = 2**20
# Cheapest first: what each adds to the time of a step grows along the list.
REMATS = ("none", "save", "full")
# Of a device's memory: the rest is for the programs themselves, the libraries' workspaces, and fragmentation.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on each device, in bytes.

    Attributes:
        update: what an optimizer step holds, at the moment at which it holds most, by name.
        rollout: what the engine and the state beside it hold.
        limit: bytes that a run may count on; None where that is not known.
        remat: the policy: the config's, or the one that ``auto`` comes to.
        rows: completions of a micro-batch on a device.
        attention: how a micro-batch's is computed.
        advice: settings that would make it fit, or that it has room for.
    """

    update: Items
    rollout: Items
    limit: float | None
    remat: str
    rows: int = 0
    attention: str = "dense"
    advice: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes most."""
        return max(sum(self.update.values()), sum(self.rollout.values()))

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.limit is None or self.peak <= self.limit

    @property
    def engine_share(self) -> float | None:
        """Share of the usable memory that the engine needs for itself, beside what training leaves there."""
        own = sum(size for name, size in self.rollout.items() if name not in self.state)
        return None if self.limit is None else own / self.limit

    @property
    def state(self) -> tuple[str, ...]:
        """Names of what stays through both phases."""
        return tuple(name for name in self.update if name in self.rollout and name != "parameters in use")

    def __str__(self) -> str:
        unit, name = _unit(self.peak)
        lines = [f"{f'memory of each device, {name}':<32}{'update':>10}{'rollout':>10}"]
        for item in dict.fromkeys([*self.update, *self.rollout]):
            cells = [part.get(item, 0.0) for part in (self.update, self.rollout)]
            if max(cells) > 0:
                lines.append(f"  {item:<30}" + "".join(_cell(cell, unit) for cell in cells))
        totals = (sum(self.update.values()), sum(self.rollout.values()))
        lines.append(f"  {'together':<30}" + "".join(_cell(total, unit) for total in totals))
        usable = "unknown" if self.limit is None else _text(self.limit)
        share = "" if self.engine_share is None else f", engine's share {self.engine_share:.0%}"
        chosen = f"micro-batch {self.rows}, remat {self.remat}, attention {self.attention}"
        lines.append(f"  usable: {usable}; {chosen}{share}")
        return "\n".join([*lines, *(f"  {line}" for line in self.advice)])


def _unit(size: float) -> tuple[int, str]:
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def _text(size: float) -> str:
    unit, name = _unit(size)
    return f"{size / unit:.2f} {name}"


def _cell(size: float, unit: int) -> str:
    """A size in ten characters; what is too small for two digits is not hidden as a zero."""
    if not size:
        return f"{'-':>10}"
    return f"{'<0.01':>10}" if size / unit < 0.005 else f"{size / unit:10.2f}"


def make_plan(
    config: RLConfig,
    spec: DecoderSpec,
    layout: Layout,
    *,
    reference: bool,
    limit: float | None,
    group: int = 1,
    platform: str | None = None,
    held_out: int = 0,
    greedy: bool = False,
) -> Plan:
    """The plan of a config.

    Args:
        spec: of the model.
        layout: mesh and strategy.
        reference: whether there is a reference model.
        limit: usable bytes of a device, as :func:`usable_bytes` gives them; None plans without.
        group: completions of which a micro-batch holds a multiple, where the objective compares these.
        platform: of the devices, such as ``gpu``; None: of those in the mesh.
        held_out: prompts of an evaluation, which the engine answers too.
        greedy: whether each prompt of a rollout is also answered greedily.
    """

    def sizes_of(changed: RLConfig, remat: str) -> Sizes:
        return Sizes(changed, spec, layout, remat, platform, held_out, greedy)

    search = functools.partial(_best, sizes_of=sizes_of, reference=reference, limit=limit)
    plan = search(config)
    if limit is None:
        return plan

    def fits(changed: RLConfig) -> bool:
        return search(changed).fits

    if not plan.fits:
        apart = sizes_of(config, plan.remat).host_is_apart
        return dataclasses.replace(plan, advice=remedies(config, fits, group, offload=apart))
    # Larger micro-batches that need more to be computed again would gain nothing.
    same: dict[str, Any] = {"remat": plan.remat}
    chosen = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **same))
    return dataclasses.replace(plan, advice=room(chosen, fits))


def check_plan(plan: Plan) -> None:
    """Refuses what cannot fit.

    Raises:
        ConfigError: it does not; the message names settings that would.
    """
    if plan.fits or plan.limit is None:
        return
    phase = "an update" if sum(plan.update.values()) == plan.peak else "a rollout"
    settings = "; ".join(plan.advice) or "no setting of this run would: take more devices or a smaller model"
    raise ConfigError(
        f"memory: {phase} takes {_text(plan.peak)} of each device, of which {_text(plan.limit)} are usable; "
        f"{settings}. (memory.device_gib says what a run may count on.)"
    )


def usable_bytes(config: RLConfig, device: jax.Device) -> float | None:
    """Bytes of a device that a plan may fill; of CPU devices, each one's share of the machine's.

    Not of what is free just now: a run that is resumed must plan as it did, or its sums would round otherwise.
    """
    if config.memory.device_gib is not None:
        return config.memory.device_gib * GIB
    if device.platform == "cpu":
        return USABLE * psutil.virtual_memory().total / jax.local_device_count()
    stats = device.memory_stats()
    return USABLE * stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def _best(
    config: RLConfig, *, sizes_of: Callable[[RLConfig, str], Sizes], reference: bool, limit: float | None
) -> Plan:
    """The plan of the config's policy; of ``auto``, that of the first policy that fits, else of the last."""
    policy = config.memory.remat
    for remat in REMATS if policy == "auto" else (policy,):
        sizes = sizes_of(config, remat)
        state = state_items(sizes, reference)
        plan = Plan(
            update=state | update_items(sizes, reference),
            rollout=state | rollout_items(sizes),
            limit=limit,
            remat=remat,
            rows=sizes.rows,
            attention=sizes.attention,
        )
        if plan.fits:
            break
    return plan
