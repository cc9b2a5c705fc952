"""The device side of a rollout: fixed shapes, from ragged samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrft.data.batching import bucket_length
from jaxrft.data.packing import pack
from jaxrft.parallel import Layout
from jaxrft.training.filling import Limits, Parts, Shape, fill, shape_of
from jaxrft.training.forward import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Samples of one or several optimizer steps, in ``parts`` micro-batches.

    A *row* is what the model runs, a *sample* one completion with its prompt. Padded rows hold one sample each, and
    the samples of all micro-batches are in the order of the list that they came from. Packed rows hold several; the
    samples of a micro-batch keep the order of the list, those of a batch do not: ``sample_ids`` say which is where.

    Arrays over ``response`` are aligned to the response: column 0 is its first token.

    Attributes:
        tokens: prompts and responses, one sample after another; 0 behind them.
        lengths: valid tokens of a row.
        segment_ids: 1, 2, ... for the samples of a packed row, 0 behind them; None for padded rows.
        places: time index of the token that predicts each response token of the row, one sample after another; 0
            behind them. Only these are projected to the vocabulary. None: every time step is, and ``picks`` is
            ``time``.
        temperature: sampling temperature of the token that each pick predicts.
        sources: where each response token's log-probability is among ``rows * picks``; -1 where there is none.
        sample_ids: index of each sample in the list; -1 for an empty place.
        mask: 1 for response tokens that are trained on.
        advantages: of each response token.
        groups: group of each sample, counted over the whole rollout.
        sampler_logprobs: the engine's, 0 where masked.
        old_logprobs: the policy's before the first update on these samples.
        ref_logprobs: the reference's; None without a KL term.
        use_old: whether ``old_logprobs`` hold anything; else this is the first update, and the
            policy's own are the old ones.
        used: micro-batches of each optimizer step that hold anything, its first ones; None: all do.
    """

    tokens: Int[AnyArray, "parts rows time"]
    lengths: Int[AnyArray, "parts rows"]
    segment_ids: Int[AnyArray, "parts rows time"] | None
    places: Int[AnyArray, "parts rows picks"] | None
    temperature: Float[AnyArray, "parts rows picks"]
    sources: Int[AnyArray, "parts samples response"]
    sample_ids: Int[AnyArray, "parts samples"]
    mask: Float[AnyArray, "parts samples response"]
    advantages: Float[AnyArray, "parts samples response"]
    groups: Int[AnyArray, "parts samples"]
    sampler_logprobs: Float[AnyArray, "parts samples response"]
    old_logprobs: Float[AnyArray, "parts samples response"]
    ref_logprobs: Float[AnyArray, "parts samples response"] | None
    use_old: Bool[AnyArray, "parts"]
    used: Int[AnyArray, "steps"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion, ready to be trained on.

    Attributes:
        prompt_ids, response_ids: its tokens.
        logprobs: the engine's log-probability of each response token.
        advantage: of the whole response, where it is known before the batch is made.
        trained: whether the response counts in the loss.
        group: samples of one prompt have the same.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    logprobs: np.ndarray
    advantage: float = 0.0
    trained: bool = True
    group: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


def longest_bucket(samples: Sequence[Sample], multiple: int = 1) -> int:
    """Tokens of a row that holds any one of the samples, a multiple of the devices that share its time steps."""
    bucket = bucket_length(max(s.length for s in samples), minimum=8)
    return bucket + -bucket % multiple


def make_batch(
    samples: Sequence[Sample],
    rows: int,
    *,
    temperature: float,
    first_token_temperature: float | None = None,
    pick: bool = True,
    multiple: int = 1,
    limits: Limits | None = None,
) -> TrainBatch:
    """Host arrays of ``len(samples) / rows`` micro-batches, each row one sample, padded to bucketed lengths.

    ``old_logprobs`` are zeros and ``ref_logprobs`` None until they are scored.

    Args:
        samples: a multiple of ``rows`` of them.
        rows: samples of a micro-batch.
        temperature: of the sampling.
        first_token_temperature: of each response's first token, where it differs.
        pick: project only the response tokens to the vocabulary; else every time step, as where time is sharded.
        multiple: of which the rows' length must be one.
        limits: of the run; None: shapes follow from these samples alone.
    """
    time = longest_bucket(samples, multiple) if limits is None else limits.fitting(samples, multiple)[0]
    parts = [[[i] for i in range(start, start + rows)] for start in range(0, len(samples), rows)]
    shape = shape_of(samples, parts, rows, time, rows, pick, limits, multiple)
    batch = _batch(samples, parts, shape, pick, temperature, first_token_temperature)
    return dataclasses.replace(batch, segment_ids=None)


def pack_batch(
    samples: Sequence[Sample],
    rows: int,
    time: int,
    *,
    steps: int,
    temperature: float,
    first_token_temperature: float | None = None,
    devices: int = 1,
    pick: bool = True,
    limits: Limits | None = None,
) -> TrainBatch:
    """Host arrays of micro-batches whose rows hold several samples each.

    Each optimizer step has its share of the list, packed apart. All have as many micro-batches as the one that needs
    most, rounded up to a bucket; the last ones of a step may be empty.

    Args:
        samples: a multiple of ``steps`` of them.
        rows: of a micro-batch.
        time: tokens of a row.
        steps: optimizer steps that share the samples.
        devices: that share the rows of a micro-batch.
        temperature, first_token_temperature, pick, limits: as for :func:`make_batch`.

    Raises:
        ValueError: a sample is longer than a row.
    """
    share = len(samples) // steps
    packed = []
    for start in range(0, len(samples), share):
        lengths = [s.length for s in samples[start : start + share]]
        found = [[start + i for i in row] for row in pack(lengths, time, rows, devices)]
        packed.append([found[first : first + rows] for first in range(0, len(found), rows)])
    used = np.array([len(parts) for parts in packed], np.int32)
    each = bucket_length(int(np.max(used)), minimum=1)
    parts = [part for found in packed for part in [*found, *[[]] * (each - len(found))]]
    most = bucket_length(max(sum(map(len, part)) for part in parts), minimum=1)
    shape = shape_of(samples, parts, rows, time, most + -most % devices, pick, limits)
    batch = _batch(samples, parts, shape, pick, temperature, first_token_temperature)
    return dataclasses.replace(batch, used=used)


def _batch(
    samples: Sequence[Sample], parts: Parts, shape: Shape, pick: bool, temperature: float, first: float | None
) -> TrainBatch:
    first = temperature if first is None else first
    arrays: dict[str, Any] = fill(samples, parts, shape, pick=pick, temperature=temperature, first_temperature=first)
    arrays["places"] = arrays["places"] if pick else None
    return TrainBatch(
        **arrays,
        old_logprobs=np.zeros_like(arrays["mask"]),
        ref_logprobs=None,
        use_old=np.zeros((len(parts),), bool),
        used=None,
    )


def batch_shardings(batch: TrainBatch, layout: Layout) -> Any:
    """Sharding of each array: what the model runs over lies with the rows' devices; what the loss reads, small, on all.

    Args:
        batch: its arrays may be abstract.
    """
    rows, steps = (None, "batch"), (None, "batch", "time")
    picks = (*rows, "time") if batch.places is None else (*rows, None)
    axes = {"tokens": steps, "segment_ids": steps, "lengths": rows, "places": (*rows, None), "temperature": picks}

    def one(path: Any, array: Any) -> jax.sharding.NamedSharding:
        names = axes.get(path[0].name, (None,) * array.ndim)
        return layout.named(layout.activation(names, array.shape))

    return jax.tree_util.tree_map_with_path(one, batch)


def select_step(batch: TrainBatch, step: int, steps: int) -> TrainBatch:
    """The micro-batches of one of the optimizer steps that share a batch."""
    each = batch.tokens.shape[0] // steps
    used = None if batch.used is None else batch.used[step : step + 1]
    parts = jax.tree.map(lambda a: a[step * each : (step + 1) * each], dataclasses.replace(batch, used=None))
    return dataclasses.replace(parts, used=used)


def list_order(sample_ids: Int[AnyArray, "parts samples"]) -> Int[Array, "places"]:
    """Flat places in the order of the list; empty places come last."""
    ids = jnp.ravel(sample_ids)
    return jnp.argsort(jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids), stable=True)


def in_list_order(batch: TrainBatch, values: AnyArray) -> np.ndarray:
    """Values [parts, samples, ...] of a batch on the host as [listed, ...], in the order of the list."""
    ids, flat = np.ravel(batch.sample_ids), np.asarray(values)
    flat = flat.reshape(-1, *flat.shape[2:])
    return flat[ids >= 0][np.argsort(ids[ids >= 0], kind="stable")]
