"""A packed bucket holds every tensor as a server lays it out, from whole parameters and from shards."""

from __future__ import annotations

CODE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrft.rollout.transfer.export import Exporter
from jaxrft.rollout.transfer.plan import Bucket, Entry
draw = np.random.default_rng(0).standard_normal
values = {("a",): draw((6, 4), np.float32), ("b",): draw(5, np.float32), ("c",): draw((2, 3), np.float32)}
entries = (Entry("a", (4, 6), ("a",), True), Entry("b", (5,), ("b",), False), Entry("c", (2, 3), ("c",), False))
wanted = np.concatenate([values["a",].T.ravel(), values["b",], values["c",].ravel()])
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
for specs in (None, {("a",): "fsdp", ("b",): None, ("c",): "fsdp"}):
    place = lambda path: jax.devices()[0] if specs is None else NamedSharding(mesh, PartitionSpec(specs[path]))
    given = {path: jax.device_put(value, place(path)) for path, value in values.items()}
    for dtype in ("float32", "bfloat16"):
        packed = Exporter(given["a",], dtype).pack(Bucket(entries), given)
        assert packed.dtype == dtype
        assert len(packed.devices()) == (1 if specs is None else 2)
        for shard in packed.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), wanted.astype(jnp.dtype(dtype)))
print("equal")
"""


def test_packed_tensors_lie_as_servers_want_them(run_python) -> None:
    assert run_python(CODE, devices=2).stdout.splitlines() == ["equal"]
