"""The losses of a batch whose rows are spread over 8 devices, in all the ways of JAX; run in a process of its own."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrft import algorithms as alg
from tests.algorithms.cases import Case, loss_of, objective_of, random_case

DEVICES, SHAPE, AXIS = 8, (16, 6), "rows"
NAMES = [
    "ppo", "gspo_token", "gmpo", "cispo_sequence", "reinforce", "cpgd_dual", "sapo", "clip_cov", "kl_cov", "dppo_tv",
    "dppo_kl", "luspo", "vespo", "dro", "gvpo", "truncate_sequence", "mask_geometric", "opsm", "entropy_batch",
    "entropy_sequence", "weighted_k1", "all_at_once",
]  # fmt: skip
ROWS, ALL = PartitionSpec(AXIS), PartitionSpec()
CRITIC = "critic"


def make_case() -> Case:
    """Lengths that differ between devices, two of which have nothing; groups lie across them."""
    case = random_case(np.random.default_rng(0), SHAPE, 0.5, garbage=False)
    lengths = np.array([0, 0, 0, 0, 6, 6, 6, 5, 1, 0, 4, 2, 1, 1, 5, 3])
    mask = (np.arange(6) < lengths[:, None]).astype(np.float32)
    arrays = {name: np.where(mask > 0, a, np.nan) for name, a in case._asdict().items() if a.shape == SHAPE}
    return case._replace(**{**arrays, "mask": mask, "groups": np.arange(16) % 3})


def loss(name, logprobs, case, axis_name=None):
    """(loss, statistics)."""
    if name == CRITIC:
        return alg.value_loss(logprobs, case.old, case.advantages, case.mask, 0.3, axis_name, reduction="sequence_mean")
    return loss_of(objective_of(name), logprobs, case, axis_name=axis_name)


def results(case, axis_name=None):
    """((loss, statistics), gradient) of each name."""
    return {
        name: jax.value_and_grad(functools.partial(loss, name, case=case, axis_name=axis_name), has_aux=True)(
            case.logprobs
        )
        for name in [*NAMES, CRITIC]
    }


def in_pmap(case):
    local = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), case)
    out = jax.device_get(jax.pmap(functools.partial(results, axis_name=AXIS), axis_name=AXIS)(local))
    for scalars, _ in out.values():
        assert all(np.all(a == a[0]) for a in jax.tree.leaves(scalars)), "loss and statistics are those of all"
    return {k: (jax.tree.map(lambda a: a[0], scalars), g.reshape(SHAPE)) for k, (scalars, g) in out.items()}


def in_shard_map(mesh, case):
    specs = dict.fromkeys([*NAMES, CRITIC], (ALL, ROWS))
    inside = functools.partial(results, axis_name=AXIS)
    return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(ROWS,), out_specs=specs))(case)


def around_shard_map(mesh, case):
    """The gradient is taken outside."""

    def value(name, logprobs):
        inside = functools.partial(loss, name, axis_name=AXIS)
        return jax.shard_map(inside, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ALL)(logprobs, case)

    def everything(logprobs):
        return {
            name: jax.value_and_grad(functools.partial(value, name), has_aux=True)(logprobs)
            for name in [*NAMES, CRITIC]
        }

    return jax.jit(everything)(case.logprobs)


def gap(one, other) -> float:
    """The largest difference, against the size of what is compared."""
    return max(
        float(np.max(np.abs(a - b)) / (1e-3 + np.max(np.abs(a)))) if np.all(np.isfinite(b)) else float("inf")
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def group_advantages(case, sharding) -> dict[str, float]:
    fn = jax.jit(alg.group_advantages, static_argnums=(2, 3, 4))
    arrays = np.nan_to_num(case.advantages[:, 0]), case.groups
    gaps = {}
    for scale in ("std", "batch_std"):
        one, eight = (fn(*arrays, 3, "leave_one_out", scale) for arrays in (arrays, jax.device_put(arrays, sharding)))
        gaps[f"advantages/{scale}"] = gap(jax.device_get(one), jax.device_get(eight))
    return gaps


def main() -> None:
    """Prints the gaps to one device, by way and name, and the sizes of the gradients."""
    assert jax.device_count() == DEVICES
    case, mesh = make_case(), jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, ROWS)
    spread = jax.device_put(case, sharding)
    assert all(not array.is_fully_replicated for array in spread)
    one = jax.device_get(jax.jit(results)(jax.tree.map(jnp.asarray, case)))
    ways = {
        "jit": jax.jit(results)(spread),
        "pmap": in_pmap(case),
        "shard_map": in_shard_map(mesh, spread),
        "around shard_map": around_shard_map(mesh, spread),
    }
    gaps = {
        f"{way}/{name}": gap(one[name], out[name]) for way, out in jax.device_get(ways).items() for name in one
    } | group_advantages(case, sharding)
    sizes = {name: float(np.abs(gradient).max()) for name, (_, gradient) in one.items()}
    print(json.dumps({"gaps": gaps, "sizes": sizes}))
