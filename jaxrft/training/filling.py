"""The host arrays of a train batch, from ragged samples and the rows that they stand in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxrft.data.batching import bucket_length, halvings

if TYPE_CHECKING:
    from jaxrft.training.batch import Sample

# The samples of each row of each micro-batch; a micro-batch may be empty.
Parts = Sequence[Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The last axes of a batch's arrays."""

    rows: int
    time: int
    picks: int
    samples: int
    response: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """The longest that a run's samples may be; with them, its batches have one of few shapes.

    Only what the model runs over is cut to the samples at hand. What the loss reads, a number a token, is as long as a
    response may be, so that what is made of it (advantages) is of one shape.

    Attributes:
        sample: tokens of prompt and response.
        response: tokens of a response.
    """

    sample: int
    response: int

    def fitting(self, samples: Sequence[Sample], multiple: int = 1) -> tuple[int, int]:
        """Tokens of a row for the longest sample, and of the longest response in it: halved both or neither.

        Args:
            multiple: of which a row's length must be one.
        """
        time, response = max(s.length for s in samples), max(len(s.response_ids) for s in samples)
        # A caller's own samples may be longer than the run's.
        rows = halvings(max(self.sample, time), math.lcm(8, multiple))
        responses = halvings(max(self.response, response), 4)
        steps = range(min(len(rows), len(responses)), 0, -1)
        step = next(step for step in steps if rows[-step] >= time and responses[-step] >= response)
        return rows[-step], min(responses[-step], rows[-step])

    def longest(self, samples: Sequence[Sample]) -> int:
        """Tokens that a response may have."""
        return max(self.response, *(len(s.response_ids) for s in samples))


def shape_of(
    samples: Sequence[Sample],
    parts: Parts,
    rows: int,
    time: int,
    places: int,
    pick: bool,
    limits: Limits | None = None,
    multiple: int = 1,
) -> Shape:
    """Sizes that hold all micro-batches, bucketed where they are not given.

    Args:
        samples: all of the batch.
        parts: where they stand.
        rows, time: of a micro-batch.
        places: samples of a micro-batch, empty places among them.
        pick: whether only response tokens are projected to the vocabulary.
        limits: of the run; None: as these samples need.
        multiple: of which a row's length must be one.
    """
    sizes = [len(s.response_ids) for s in samples]
    picked = max(sum(sizes[i] for i in row) for part in parts for row in part)
    if limits is None:
        picks, response = bucket_length(picked, minimum=4), bucket_length(max(sizes), minimum=4)
    else:
        single, response = limits.fitting(samples, multiple)[1], limits.longest(samples)
        # Of rows with one sample each, as many as its response has; packed ones are projected whole, or half.
        picks = single if picked <= single else next(n for n in halvings(time, 4, 2) if n >= picked)
    return Shape(rows=rows, time=time, picks=min(picks, time) if pick else time, samples=places, response=response)


def fill(
    samples: Sequence[Sample], parts: Parts, shape: Shape, *, pick: bool, temperature: float, first_temperature: float
) -> dict[str, np.ndarray]:
    """The arrays of all micro-batches by their names in ``TrainBatch``.

    Args:
        temperature, first_temperature: of the sampling, and of each response's first token.
    """
    count = len(parts)
    by_time, by_pick = (count, shape.rows, shape.time), (count, shape.rows, shape.picks)
    by_sample, by_token = (count, shape.samples), (count, shape.samples, shape.response)
    arrays = {
        "tokens": np.zeros(by_time, np.int32),
        "lengths": np.zeros(by_time[:2], np.int32),
        "segment_ids": np.zeros(by_time, np.int32),
        "places": np.zeros(by_pick, np.int32),
        "temperature": np.full(by_pick, temperature, np.float32),
        "sources": np.full(by_token, -1, np.int32),
        "sample_ids": np.full(by_sample, -1, np.int32),
        "groups": np.zeros(by_sample, np.int32),
        **{name: np.zeros(by_token, np.float32) for name in ("mask", "advantages", "sampler_logprobs")},
    }
    for part, rows in enumerate(parts):
        # In the order of the list: where all is in one micro-batch, choices by rank or at random are the list's.
        order = sorted(i for row in rows for i in row)
        places = {sample: place for place, sample in enumerate(order)}
        for row, chosen in enumerate(rows):
            start = picked = 0
            for segment, i in enumerate(chosen, start=1):
                sample, at = samples[i], (part, places[i])
                prompt, size = len(sample.prompt_ids), len(sample.response_ids)
                stop = start + prompt + size
                arrays["tokens"][part, row, start:stop] = [*sample.prompt_ids, *sample.response_ids]
                arrays["segment_ids"][part, row, start:stop] = segment
                # A response's first token is predicted by the prompt's last.
                predicting = start + prompt - 1 + np.arange(size)
                picks = picked + np.arange(size) if pick else predicting
                arrays["places"][part, row, picks] = predicting
                arrays["temperature"][part, row, picks[:1]] = first_temperature
                arrays["sources"][at][:size] = row * shape.picks + picks
                arrays["sample_ids"][at], arrays["groups"][at] = i, sample.group
                arrays["mask"][at][:size] = float(sample.trained)
                arrays["advantages"][at] = sample.advantage
                arrays["sampler_logprobs"][at][:size] = sample.logprobs
                start, picked = stop, picked + size
            arrays["lengths"][part, row] = start
    return arrays
