"""What the tests of policy losses share: a table of objectives, random batches, and one jitted evaluation."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import algorithms as alg
from tests.algorithms import reference

GROUPS = 3
SHAPE = (5, 6)
KEY = jax.random.key(7)

BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}
NARROW = {"clip_low": 0.05, "clip_high": 0.08}
COV = {"cov_share": 0.2, "cov_low": 0.05, "cov_high": 4.0}
MEAN = {"reduction": "sequence_mean"}
SUM = {"reduction": "sequence_sum"}
CONSTANT = {"reduction": "constant", "constant_length": 7}

OBJECTIVES: dict[str, dict] = {
    "ppo": {},
    "clip_higher": {**BOUNDS, **MEAN},
    "dual": {"dual_clip": 1.5, **SUM},
    "cap": {"ratio_cap": 1.6, **CONSTANT},
    "cap_dual": {**BOUNDS, "ratio_cap": 1.9, "dual_clip": 1.4},
    "one_sided": {"clip_low": 0.0, "clip_high": 0.5},
    "gspo": {"level": "sequence", **NARROW, **MEAN},
    "gspo_dual": {"level": "sequence", "dual_clip": 1.3, **CONSTANT},
    "gspo_cap": {"level": "sequence", "ratio_cap": 1.3, **SUM},
    "gspo_token": {"level": "sequence_token", **NARROW},
    "gspo_token_dual": {"level": "sequence_token", "dual_clip": 1.3, "ratio_cap": 1.5, **MEAN},
    "gmpo": {"level": "geometric", "clip_low": 0.4, **MEAN},
    "gmpo_uneven": {"level": "geometric", "clip_low": 0.1, "clip_high": 0.3},
    "cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.5},
    "cispo_sequence": {"objective": "cispo", "level": "sequence", **NARROW, **SUM},
    "reinforce": {"objective": "reinforce", **CONSTANT},
    "cpgd": {"objective": "cpgd", **BOUNDS, "drift_coef": 0.3, **MEAN},
    "cpgd_dual": {"objective": "cpgd", "dual_clip": 1.2, "drift_coef": 0.5, "drift_clip": 0.3},
    "sapo": {"objective": "sapo", **MEAN},
    "sapo_sequence": {"objective": "sapo", "level": "sequence", "sapo_positive": 0.7, "sapo_negative": 3.0},
    "sapo_token": {"objective": "sapo", "level": "sequence_token", "sapo_positive": 2.0, **SUM},
    "clip_cov": {"objective": "clip_cov", **COV},
    "clip_cov_dual": {"objective": "clip_cov", **BOUNDS, **COV, "cov_share": 0.9, "dual_clip": 1.3, **MEAN},
    "kl_cov": {"objective": "kl_cov", "cov_share": 0.3},
    "kl_cov_mean": {"objective": "kl_cov", "cov_share": 0.07, "cov_coef": 0.4, **MEAN},
    "dppo_tv": {"objective": "dppo_tv", "clip_low": 0.05, "clip_high": 0.1},
    "dppo_kl": {"objective": "dppo_kl", "clip_low": 0.02, "clip_high": 0.01, **MEAN},
    "luspo": {"objective": "luspo", **NARROW, **MEAN},
    "luspo_dual": {"objective": "luspo", "level": "sequence", "dual_clip": 1.2, **SUM},
    "vespo": {"objective": "vespo"},
    "vespo_flat": {"objective": "vespo", "vespo_positive": (0.5, 0.1), "vespo_negative": (0.3, 0.2), **MEAN},
    "dro": {"objective": "dro", "dro_coef": 0.7},
    "gvpo": {"objective": "gvpo", **MEAN},
    "gvpo_tokens": {"objective": "gvpo", "gvpo_coef": 0.8},
    "truncate": {"correction": "truncate", "correction_high": 1.2},
    "truncate_low": {"correction": "truncate", "correction_low": 0.5, **MEAN},
    "truncate_sequence": {"objective": "reinforce", "correction": "truncate", "correction_level": "sequence"},
    "truncate_geometric": {"level": "sequence", "correction": "truncate", "correction_level": "geometric", **MEAN},
    "mask": {"objective": "cispo", "correction": "mask", "correction_low": 0.5},
    "mask_sequence": {"correction": "mask", "correction_level": "sequence", "correction_low": 0.3, **MEAN},
    "mask_geometric": {"objective": "sapo", "correction": "mask", "correction_level": "geometric", **SUM},
    "opsm": {"sequence_mask": 0.1, **MEAN},
    "opsm_zero": {"objective": "luspo", "sequence_mask": 0.0, **CONSTANT},
    "entropy_batch": {"entropy_share": 0.3},
    "entropy_sequence": {"entropy_share": 0.4, "entropy_scope": "sequence", **MEAN},
    "kl_k1": {"objective": "reinforce", "kl_coef": 0.4, "kl_kind": "k1"},
    "kl_k2": {"kl_coef": 0.3, "kl_kind": "k2", **MEAN},
    "kl_k3": {"level": "sequence", "kl_coef": 0.3, **CONSTANT},
    "kl_k1+": {"objective": "dro", "kl_coef": 0.5, "kl_kind": "k1+", **SUM},
    "kl_k3+": {"kl_coef": 0.2, "kl_kind": "k3+"},
    "weighted_k1": {"kl_coef": 0.2, "kl_kind": "k1", "kl_weighted": True},
    "weighted_k3": {"level": "sequence", "kl_coef": 0.2, "kl_weighted": True, **MEAN},
    "vespo_k3+": {"objective": "vespo", "kl_coef": 0.2, "kl_kind": "k3+"},
    "all_at_once": {
        "objective": "clip_cov", **COV, "entropy_share": 0.6, "correction": "truncate", "correction_level": "sequence",
        "sequence_mask": 0.05, "kl_coef": 0.1, "kl_kind": "k2", "kl_weighted": True, **MEAN,
    },
}  # fmt: skip


class Case(NamedTuple):
    """A batch as the loss takes it; float32."""

    logprobs: np.ndarray
    old: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    sampler: np.ndarray
    entropies: np.ndarray
    ref: np.ndarray
    groups: np.ndarray


def loss_of(objective, logprobs, case, **others):
    return alg.policy_loss(
        objective, logprobs, case.old, case.advantages, case.mask,
        sampler_logprobs=case.sampler, entropies=case.entropies, ref_logprobs=case.ref,
        key=KEY, group_ids=case.groups, num_groups=GROUPS, **others,
    )  # fmt: skip


# Compiling takes most of the time here, and the code runs a few times only.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def evaluate(objective, case, **others):
    """((loss, statistics), gradient)."""
    loss = functools.partial(loss_of, objective, case=case, **others)
    return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(case.logprobs))


def objective_of(name, **changes):
    return alg.PolicyObjective(**{**OBJECTIVES[name], **changes})


def random_case(rng, shape, spread, *, per_token=True, garbage=True) -> Case:
    """A batch with holes, empty rows and, unless told, garbage at masked places; log-ratios up to ``spread``."""
    logprobs = -rng.exponential(rng.choice([0.3, 3.0], shape))
    old, sampler, ref = (logprobs + spread * rng.uniform(-1, 1, shape) for _ in range(3))
    advantages = rng.normal(size=shape if per_token else shape[:1]) * rng.choice([0.3, 1.0, 30.0], p=[0.3, 0.6, 0.1])
    entropies = rng.exponential(size=shape)
    mask = ((rng.random(shape) < 0.75) * (rng.random((shape[0], 1)) < 0.85)).astype(np.float32)
    arrays = [a.astype(np.float32) for a in (logprobs, old, advantages, sampler, entropies, ref)]
    for array in arrays if garbage else ():
        outside = mask == 0 if array.ndim == 2 else mask.max(axis=1) == 0
        array[outside] = rng.choice([np.nan, np.inf, -np.inf, -1e30, 3.0], size=int(outside.sum()))
    logprobs, old, advantages, sampler, entropies, ref = arrays
    return Case(logprobs, old, advantages, mask, sampler, entropies, ref, rng.integers(0, GROUPS, shape[0]))


def batch_of(case: Case) -> reference.Batch:
    """The same for the reference, with the random numbers that the library says it draws."""
    return reference.Batch(*case, scores=_scores(*case.mask.shape))


@functools.cache
def _scores(rows, time) -> np.ndarray:
    return np.stack([jax.random.uniform(jax.random.fold_in(KEY, i), (time,)) for i in range(rows)])


def fields_of(name) -> reference.Fields:
    return reference.Fields(**OBJECTIVES[name])
