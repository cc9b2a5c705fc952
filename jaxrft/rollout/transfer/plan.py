"""What a transfer consists of: tensors under their Hugging Face names, in buckets of bounded size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxrft.models.names import Path, Tensor


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a transfer.

    Attributes:
        name: as Hugging Face names it.
        shape: as Hugging Face lays it out.
        path: of the parameter that it is made from.
        transposed: whether the parameter has to be turned.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    transposed: bool

    @property
    def elements(self) -> int:
        """Numbers that it holds."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, one behind another."""

    entries: tuple[Entry, ...]

    @property
    def elements(self) -> int:
        """Numbers that it holds."""
        return sum(entry.elements for entry in self.entries)

    def places(self) -> list[tuple[str, list[int], int]]:
        """Name, shape and first element of each tensor."""
        places, first = [], 0
        for entry in self.entries:
            places.append((entry.name, list(entry.shape), first))
            first += entry.elements
        return places


def make_entries(
    tensors: Mapping[Path, Tensor], shapes: Mapping[Path, tuple[int, ...]], output_of: Path | None = None
) -> list[Entry]:
    """The tensors of a model, in the order of the table of names: what a layer needs stands together.

    Args:
        tensors: the name of each parameter.
        shapes: of each parameter, as the module lays it out.
        output_of: the embedding that is the output projection too, where the two are tied and the servers want both.
    """
    entries = []
    for path, tensor in tensors.items():
        shape = shapes[path][::-1] if tensor.transposed else shapes[path]
        entries.append(Entry(tensor.name, tuple(shape), path, tensor.transposed))
    if output_of is not None:
        entries.append(Entry("lm_head.weight", tuple(shapes[output_of]), output_of, False))
    return entries


def make_buckets(entries: Sequence[Entry], limit: int) -> list[Bucket]:
    """Buckets of at most ``limit`` elements; one holds more only where a single unit does.

    A unit is what a server may join into one tensor (queries, keys and values; gate and up): it holds on to the first
    of them until the last has come, so that it needs least memory where they come together.
    """
    buckets: list[list[Entry]] = []
    size = 0
    for _, group in groupby(entries, key=_unit):
        unit = list(group)
        elements = sum(entry.elements for entry in unit)
        if not buckets or size + elements > limit:
            buckets.append([])
            size = 0
        buckets[-1] += unit
        size += elements
    return [Bucket(tuple(bucket)) for bucket in buckets]


def _unit(entry: Entry) -> str:
    """``model.layers.3.self_attn`` of ``model.layers.3.self_attn.q_proj.weight``."""
    module = entry.name.rpartition(".")[0]
    return module.rpartition(".")[0] if ".layers." in module else module


def manifest(buckets: Sequence[Bucket], dtype: str) -> dict[str, Any]:
    """What servers check before the first byte: names and shapes, and the type of all."""
    return {"dtype": dtype, "tensors": [(e.name, list(e.shape)) for bucket in buckets for e in bucket.entries]}
