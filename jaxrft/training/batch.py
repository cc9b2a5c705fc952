"""The device side of a rollout: fixed shapes, from ragged samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrft.data.batching import bucket_length
from jaxrft.training.forward import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Samples of one optimizer step, in ``parts`` micro-batches of ``rows``.

    Arrays over ``response`` are aligned to the response: column 0 is its first token.

    Attributes:
        tokens: prompt and response, right-padded.
        prompt_lengths: tokens of the prompt.
        lengths: tokens of both.
        mask: 1 for response tokens that are trained on.
        temperature: each response token's sampling temperature.
        advantages: of each response token.
        groups: group of each sample, counted over the whole rollout.
        sampler_logprobs: the engine's, 0 where masked.
        old_logprobs: the policy's before the first update on these samples.
        ref_logprobs: the reference's; None without a KL term.
        use_old: whether ``old_logprobs`` hold anything; else this is the first update, and the
            policy's own are the old ones.
    """

    tokens: Int[AnyArray, "parts rows time"]
    prompt_lengths: Int[AnyArray, "parts rows"]
    lengths: Int[AnyArray, "parts rows"]
    mask: Float[AnyArray, "parts rows response"]
    temperature: Float[AnyArray, "parts rows response"]
    advantages: Float[AnyArray, "parts rows response"]
    groups: Int[AnyArray, "parts rows"]
    sampler_logprobs: Float[AnyArray, "parts rows response"]
    old_logprobs: Float[AnyArray, "parts rows response"]
    ref_logprobs: Float[AnyArray, "parts rows response"] | None
    use_old: Bool[AnyArray, "parts"]


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


def make_batch(
    samples: Sequence[Sample], rows: int, *, temperature: float, first_token_temperature: float | None = None
) -> TrainBatch:
    """Host arrays of ``len(samples) / rows`` micro-batches, padded to bucketed lengths.

    ``old_logprobs`` are zeros and ``ref_logprobs`` None until they are scored.

    Args:
        samples: a multiple of ``rows`` of them.
        rows: samples of a micro-batch.
        temperature: of the sampling.
        first_token_temperature: of each response's first token, where it differs.
    """
    count = len(samples)
    time = bucket_length(max(len(s.prompt_ids) + len(s.response_ids) for s in samples), minimum=8)
    response = bucket_length(max(len(s.response_ids) for s in samples), minimum=4)
    tokens = np.zeros((count, time), np.int32)
    mask = np.zeros((count, response), np.float32)
    sampler = np.zeros((count, response), np.float32)
    for row, sample in enumerate(samples):
        prompt, size = len(sample.prompt_ids), len(sample.response_ids)
        tokens[row, :prompt] = sample.prompt_ids
        tokens[row, prompt : prompt + size] = sample.response_ids
        mask[row, :size] = float(sample.trained)
        sampler[row, :size] = sample.logprobs
    temperatures = np.full((count, response), temperature, np.float32)
    if first_token_temperature is not None:
        temperatures[:, 0] = first_token_temperature
    prompt_lengths = np.array([len(s.prompt_ids) for s in samples], np.int32)
    batch = TrainBatch(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        lengths=prompt_lengths + np.array([len(s.response_ids) for s in samples], np.int32),
        mask=mask,
        temperature=temperatures,
        advantages=np.repeat(np.array([[s.advantage] for s in samples], np.float32), response, axis=1),
        groups=np.array([s.group for s in samples], np.int32),
        sampler_logprobs=sampler,
        old_logprobs=np.zeros((count, response), np.float32),
        ref_logprobs=None,
        use_old=np.zeros((count // rows,), bool),
    )
    return jax.tree.map(lambda a: a if a is batch.use_old else a.reshape(-1, rows, *a.shape[1:]), batch)


def select_parts(batch: TrainBatch, start: int, stop: int) -> TrainBatch:
    """Some of a batch's micro-batches."""
    return jax.tree.map(lambda a: a[start:stop], batch)
