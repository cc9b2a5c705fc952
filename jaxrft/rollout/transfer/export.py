"""Parameters, sharded or not, as one flat array in the layout and type that a server wants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrft.models.names import Path
from jaxrft.rollout.transfer.plan import Bucket


class Exporter:
    """Packs buckets on the devices. Layers of the same shapes share a program.

    Args:
        like: any parameter; the packed arrays are whole on each device of its mesh.
        dtype: of the packed arrays.
    """

    def __init__(self, like: jax.Array, dtype: str):
        sharding: Any = like.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        self._sharding, self._on_cpu = sharding, next(iter(like.devices())).platform == "cpu"
        # XLA's concatenation on a CPU is more than ten times slower than numpy's.
        program = partial(_flat if self._on_cpu else _pack, dtype=jnp.dtype(dtype))
        self._program = jax.jit(program, static_argnums=0, out_shardings=sharding)

    def pack(self, bucket: Bucket, values: Mapping[Path, jax.Array]) -> Float[Array, "elements"]:
        """The tensors of a bucket one behind another, gathered from all shards.

        Args:
            bucket: what to pack.
            values: parameters by path.
        """
        turned = tuple(entry.transposed for entry in bucket.entries)
        made = self._program(turned, [values[entry.path] for entry in bucket.entries])
        if not self._on_cpu:
            return made
        return jax.device_put(np.concatenate([np.asarray(array) for array in made]), self._sharding)


def _flat(turned: tuple[bool, ...], arrays: list[jax.Array], dtype: Any) -> list[jax.Array]:
    # Cast first: what is gathered is then no larger than what is sent.
    cast = [array.astype(dtype) for array in arrays]
    return [(array.T if turn else array).reshape(-1) for turn, array in zip(turned, cast)]


def _pack(turned: tuple[bool, ...], arrays: list[jax.Array], dtype: Any) -> jax.Array:
    return jnp.concatenate(_flat(turned, arrays, dtype))
