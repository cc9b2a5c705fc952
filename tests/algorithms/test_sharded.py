"""Rows that are spread over 8 devices give the loss, gradient and statistics of one device."""

import json

CODE = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jaxrft import algorithms as alg
from jaxrft.parallel import batch_sharding, make_mesh

mesh = make_mesh(8)
rng = np.random.default_rng(0)
logprobs, noise, ref = rng.normal(size=(3, 16, 6)).astype(np.float32)
mask = (np.arange(6) < rng.integers(0, 7, 16)[:, None]).astype(np.float32)
mask[:4] = 0  # two devices have nothing
mask[4:6] = 1
advantages = rng.normal(size=16).astype(np.float32)
arrays = logprobs, logprobs + noise, advantages, mask, ref

@functools.partial(jax.jit, static_argnums=0)
def evaluate(objective, logprobs, old, advantages, mask, ref):
    def loss(x):
        return alg.policy_loss(objective, x, old, advantages, mask, ref_logprobs=ref)
    return jax.value_and_grad(loss, has_aux=True)(logprobs)

differences = {}
for number, fields in enumerate([
    {"kl_coef": 0.1},
    {"reduction": "sequence_mean", "dual_clip": 2.0},
    {"reduction": "constant", "constant_length": 9, "level": "sequence"},
]):
    objective = alg.PolicyObjective(**fields)
    one = evaluate(objective, *map(jnp.asarray, arrays))
    spread = [jax.device_put(a, batch_sharding(mesh)) for a in arrays]
    assert all(len(a.sharding.device_set) == 8 and not a.is_fully_replicated for a in spread)
    eight = jax.device_get(evaluate(objective, *spread))
    assert float(jnp.abs(one[1]).max()) > 1e-3
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b)) / (1e-3 + jnp.max(jnp.abs(a)))), one, eight)
    differences[number] = max(jax.tree.leaves(gaps))

groups = np.arange(16) % 5
fn = jax.jit(alg.group_advantages, static_argnums=(2, 3, 4))
for scale in ("std", "batch_std"):
    one = fn(jnp.asarray(advantages), jnp.asarray(groups), 5, "leave_one_out", scale)
    eight = fn(*(jax.device_put(a, batch_sharding(mesh)) for a in (advantages, groups)), 5, "leave_one_out", scale)
    differences[scale] = float(np.max(np.abs(np.asarray(one) - np.asarray(eight))))
print(json.dumps(differences))
"""


def test_eight_devices_are_one(run_python):
    differences = json.loads(run_python(CODE, devices=8).stdout.splitlines()[-1])
    assert len(differences) == 5
    assert max(differences.values()) < 2e-6, differences
