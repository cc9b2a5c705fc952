"""The memory plan of a run: what each device will hold, before anything is loaded.

Two phases are compared with the device's memory, the update and the rollout. What state takes is exact: it follows
from shapes and shardings. What a program holds while it runs is counted from what its backward pass keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx

from jaxrft.config import ConfigError, RLConfig
from jaxrft.data.batching import bucket_length
from jaxrft.models.decoder import Decoder
from jaxrft.models.logprobs import logits_elements
from jaxrft.models.spec import DecoderSpec
from jaxrft.parallel import Layout, describe
from jaxrft.parallel.description import GIB
from jaxrft.parallel.rules import SHARDING_AXES

# Cheapest first: what each adds to the time of a step grows along the list.
REMATS = ("none", "save", "full")
# Of a device's memory: the rest is for the programs themselves, the libraries' workspaces, and fragmentation.
USABLE = 0.92
FLOAT32 = 4

Items = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on each device, in bytes.

    Attributes:
        update: what an optimizer step holds, by name.
        rollout: what the engine and the state beside it hold.
        limit: bytes that a run may count on; None where that is not known.
        remat: the policy: the config's, or the one that ``auto`` comes to.
        advice: settings that would make it fit, or that it has room for.
    """

    update: Items
    rollout: Items
    limit: float | None
    remat: str
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
        """Share of the device's memory that the engine needs for itself, beside what training leaves there."""
        own = sum(self.rollout[name] for name in ("engine's parameters", "caches", "decoding"))
        return None if self.limit is None else own / self.limit

    def __str__(self) -> str:
        lines = ["memory of each device, GiB            update  rollout"]
        for name in dict.fromkeys([*self.update, *self.rollout]):
            cells = [self.update.get(name, 0.0) / GIB, self.rollout.get(name, 0.0) / GIB]
            if max(cells) > 0:
                lines.append(f"  {name:<34}" + "".join(f"{cell:8.3f}" if cell else "       -" for cell in cells))
        totals = [sum(self.update.values()) / GIB, sum(self.rollout.values()) / GIB]
        lines.append(f"  {'together':<34}" + "".join(f"{total:8.3f}" for total in totals))
        limit = "unknown" if self.limit is None else f"{self.limit / GIB:.3f}"
        share = "" if self.engine_share is None else f", engine's share {self.engine_share:.0%}"
        lines.append(f"  usable: {limit}; remat: {self.remat}{share}")
        return "\n".join([*lines, *(f"  {line}" for line in self.advice)])


def make_plan(config: RLConfig, spec: DecoderSpec, layout: Layout, *, reference: bool, limit: float | None) -> Plan:
    """The plan of a config.

    Args:
        spec: of the model.
        layout: mesh and strategy.
        reference: whether there is a reference model.
        limit: usable bytes of a device, as :func:`usable_bytes` gives them; None plans without.
    """
    policy = config.memory.remat
    for remat in REMATS if policy == "auto" else (policy,):
        plan = _with_remat(config, spec, layout, remat, reference, limit)
        if plan.fits:
            break
    search = functools.partial(_fits, spec=spec, layout=layout, reference=reference, limit=limit)
    if not plan.fits:
        return dataclasses.replace(plan, advice=_remedies(config, search))
    room = _room(config, search) if limit is not None else ()
    return dataclasses.replace(plan, advice=room)


def check_plan(plan: Plan) -> None:
    """Refuses what cannot fit.

    Raises:
        ConfigError: it does not; the message names settings that would.
    """
    if plan.fits or plan.limit is None:
        return
    phase = "an update" if sum(plan.update.values()) == plan.peak else "a rollout"
    remedies = "; ".join(plan.advice) or "no setting of this run would: take more devices or a smaller model"
    raise ConfigError(
        f"memory: {phase} takes {plan.peak / GIB:.2f} GiB of each device, of which {plan.limit / GIB:.2f} are usable; "
        f"{remedies}. (memory.device_gib says what a run may count on.)"
    )


def usable_bytes(config: RLConfig, device: jax.Device) -> float | None:
    """Bytes of a device that a plan may fill; of CPU devices, each one's share of the memory that is free."""
    if config.memory.device_gib is not None:
        return config.memory.device_gib * GIB
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return USABLE * stats["bytes_limit"]
    if device.platform == "cpu":
        return USABLE * psutil.virtual_memory().available / jax.local_device_count()
    return None


# ---------------------------------------------------------------------- what each phase holds


def _with_remat(
    config: RLConfig, spec: DecoderSpec, layout: Layout, remat: str, reference: bool, limit: float | None
) -> Plan:
    sizes = _Sizes(config, spec, layout)
    state = _state(config, sizes, reference)
    update = state | _update(config, sizes, remat)
    return Plan(update=update, rollout=state | _rollout(config, sizes), limit=limit, remat=remat)


class _Sizes:
    """The numbers of one device that the counts are made of."""

    def __init__(self, config: RLConfig, spec: DecoderSpec, layout: Layout):
        self.spec, self.layout, mesh = spec, layout, layout.mesh.shape
        self.tensor, self.sequence = mesh["tensor"], mesh["sequence"]
        self.itemsize = jnp.dtype(config.model.dtype).itemsize
        self.param_itemsize = jnp.dtype(config.model.param_dtype).itemsize
        self.rows = config.per_device_train_batch_size
        self.time = bucket_length(config.max_prompt_length + config.max_completion_length)
        self.response = bucket_length(config.max_completion_length)
        self.tokens = self.rows * self.time / self.sequence
        self.vocab = spec.vocab_size / (self.tensor if spec.vocab_size % self.tensor == 0 else 1)
        self.state = describe(_abstract(spec, config.model.param_dtype), layout)
        self.layers = [sum(p.param_bytes for p in self.state.places if p.name.startswith("layers."))]

    @property
    def is_sharded(self) -> bool:
        return self.layout.shards("params") and any(self.layout.mesh.shape[axis] > 1 for axis in SHARDING_AXES)

    @property
    def layer_elements(self) -> float:
        """Parameters of one layer on a device that has them gathered."""
        spec = self.spec
        attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
        return (attention + 3 * spec.hidden_size * spec.intermediate_size) / self.tensor

    def layer_bytes(self, remat: str, names: list[str]) -> float:
        """What one layer keeps for its backward pass."""
        spec, tokens = self.spec, self.tokens
        heads = spec.num_heads * spec.head_dim / self.tensor
        kv = spec.num_kv_heads * spec.head_dim / min(self.tensor, spec.num_kv_heads)
        inner = spec.intermediate_size / self.tensor
        width = {
            "layer_input": spec.hidden_size, "query": heads, "key": kv, "value": kv, "attention": heads,
            "gate": inner, "up": inner,
        }  # fmt: skip
        if remat in ("full", "offload"):
            return tokens * spec.hidden_size * self.itemsize
        if remat == "save":
            return tokens * sum(width[name] for name in {"layer_input", *names}) * self.itemsize
        # Both inputs of the two blocks with their norms, all named tensors but the first, and the gated product.
        kept = 4 * spec.hidden_size + sum(width.values()) - spec.hidden_size + inner
        return tokens * kept * self.itemsize + self.score_bytes

    @property
    def score_bytes(self) -> float:
        """Attention's scores, before and after the softmax, of one layer."""
        return 2 * FLOAT32 * self.tokens * self.time * self.spec.num_heads / self.tensor


@functools.lru_cache(maxsize=8)
def _abstract(spec: DecoderSpec, dtype: str) -> Any:
    model = nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), nnx.state(model, nnx.Param))


def _state(config: RLConfig, sizes: _Sizes, reference: bool) -> Items:
    """What stays on the devices through both phases."""
    return {
        "parameters": sizes.state.param_bytes,
        "optimizer moments": 0 if config.memory.offload_optimizer else sizes.state.moment_bytes,
        "reference": sizes.state.param_bytes if reference and not config.memory.offload_reference else 0,
    }


def _update(config: RLConfig, sizes: _Sizes, remat: str) -> Items:
    spec, state, elements = sizes.spec, sizes.state, sizes.layer_elements
    gradients = state.gradient_bytes * (2 if config.gradient_accumulation_steps > 1 else 1)
    names = config.memory.remat_names
    items: Items = {
        "gradients": gradients,
        "activations kept": spec.num_layers * sizes.layer_bytes(remat, names),
        # The layer that is being computed or differentiated: all that it keeps, and as much again of cotangents.
        "activations of one layer": sizes.layer_bytes("none", names) * (1 if remat == "none" else 2),
        "output projection": _projection(sizes),
    }
    cast = sizes.itemsize != sizes.param_itemsize
    if sizes.is_sharded or cast:
        items["parameters in use"] = 2 * elements * sizes.itemsize + sizes.vocab * spec.hidden_size * sizes.itemsize
    if config.memory.scan_layers:
        share = sum(p.param_bytes for p in state.places if p.name.startswith("layers."))
        share_gradients = sum(p.gradient_bytes for p in state.places if p.name.startswith("layers."))
        items["layers stacked"] = share + 2 * share_gradients
    # Moments from the host come in when activations are gone.
    transient = state.moment_bytes if config.memory.offload_optimizer else 0
    held = sum(items[name] for name in ("activations kept", "activations of one layer", "output projection"))
    if transient > held:
        items["moments from the host"] = transient - held
    return items


def _projection(sizes: _Sizes) -> float:
    """Chunks of logits, and the kernel with its gradient."""
    rows, width = sizes.rows, sizes.spec.hidden_size
    picked = sizes.response if sizes.sequence == 1 else sizes.time / sizes.sequence
    logits = min(logits_elements(), rows * picked * sizes.vocab) * FLOAT32
    hidden = rows * picked * width * sizes.itemsize
    return 3 * logits + 3 * hidden + sizes.vocab * width * (FLOAT32 + sizes.itemsize)


def _rollout(config: RLConfig, sizes: _Sizes) -> Items:
    spec = sizes.spec
    mesh = sizes.layout.mesh.shape
    slots = max(config.rollout.max_slots / (mesh["replica"] * mesh["fsdp"] * mesh["sequence"]), 1)
    longest = config.max_prompt_length + config.max_completion_length
    kv_heads = spec.num_kv_heads / (sizes.tensor if spec.num_kv_heads % sizes.tensor == 0 else 1)
    cache = 2 * slots * bucket_length(longest) * kv_heads * spec.head_dim * sizes.itemsize
    elements = sum(p.param_bytes for p in sizes.state.places) / sizes.param_itemsize
    shards = mesh["fsdp"] * mesh["sequence"]
    return {
        "engine's parameters": elements * shards * sizes.param_itemsize if sizes.is_sharded else 0,
        # One layer is there twice while caches grow.
        "caches": cache * (spec.num_layers + 1),
        "decoding": 3 * slots * spec.vocab_size * FLOAT32 + 2 * sizes.layer_elements * sizes.itemsize,
    }


# ---------------------------------------------------------------------- what else would fit


def _fits(config: RLConfig, *, spec: DecoderSpec, layout: Layout, reference: bool, limit: float | None) -> bool:
    policies = REMATS if config.memory.remat == "auto" else (config.memory.remat,)
    return any(_with_remat(config, spec, layout, remat, reference, limit).fits for remat in policies)


def _remedies(config: RLConfig, fits: Any) -> tuple[str, ...]:
    """The first settings, from cheap to dear, that make a config fit, each alone; else the first that do together."""
    changed, together, alone = config, [], []
    for text, change in _changes(config):
        if fits(change(config)):
            alone.append(f"{text} fits")
        changed = change(changed)
        together.append(text)
        if not alone and fits(changed):
            return (f"{' and '.join(together)} fit together",)
    return tuple(alone[:3])


def _changes(config: RLConfig) -> Iterator[tuple[str, Any]]:
    def memory(**fields: Any) -> Any:
        return lambda c: dataclasses.replace(c, memory=dataclasses.replace(c.memory, **fields))

    def unchecked(c: RLConfig, **fields: Any) -> RLConfig:
        return dataclasses.replace(c, **fields)

    settings = config.memory
    if settings.remat in ("none", "save"):
        yield "memory.remat=full", memory(remat="full")
    if not settings.offload_reference:
        yield "memory.offload_reference=true", memory(offload_reference=True)
    slots = config.rollout.max_slots
    while slots > 8:
        slots //= 2
        rollout = dataclasses.replace(config.rollout, max_slots=slots)
        yield f"rollout.max_slots={slots}", functools.partial(unchecked, rollout=rollout)
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    while rows % 2 == 0:
        rows, parts = rows // 2, parts * 2
        text = f"per_device_train_batch_size={rows} with gradient_accumulation_steps={parts}"
        steps = (
            config.steps_per_generation and config.steps_per_generation * parts // config.gradient_accumulation_steps
        )
        yield (
            text,
            functools.partial(
                unchecked,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=parts,
                steps_per_generation=steps,
            ),
        )
    if not settings.offload_optimizer:
        yield "memory.offload_optimizer=true", memory(offload_optimizer=True)


def _room(config: RLConfig, fits: Any) -> tuple[str, ...]:
    """The largest micro-batch that a config has room for, where it is larger than its own."""
    rows, parts = config.per_device_train_batch_size, config.gradient_accumulation_steps
    best = None
    while parts % 2 == 0:
        rows, parts = rows * 2, parts // 2
        changed = dataclasses.replace(
            config,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts,
            steps_per_generation=None,
            generation_batch_size=config.rollout_samples,
        )
        if not fits(changed):
            break
        best = f"has room for per_device_train_batch_size={rows} with gradient_accumulation_steps={parts}"
    return (best,) if best else ()
