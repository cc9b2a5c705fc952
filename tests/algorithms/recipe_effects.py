"""What the fields of a recipe change: a value for each, and a pipeline over fixed data that shows where it acts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import algorithms as alg
from jaxrft.algorithms.objectives import SURROGATES
from jaxrft.data.records import Prompt
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion
from jaxrft.training.drawing import draw
from jaxrft.training.rollouts import RolloutBatch


@dataclasses.dataclass(frozen=True)
class Change:
    """Another value of a field, and where it shows first.

    Attributes:
        where: the stage.
        values: the first that the field has not got is taken.
        needs: other fields, without which this one changes nothing.
    """

    where: str
    values: tuple[Any, ...] = ()
    needs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def value(self, recipe: alg.Recipe, field: str) -> Any:
        parts = [getattr(recipe, part.name) for part in dataclasses.fields(recipe)]
        (now,) = (getattr(part, field) for part in parts if hasattr(part, field))
        values = SURROGATES[recipe.policy.objective].levels if field == "level" else self.values
        return next(value for value in values if value != now)

    def stage(self, recipe: alg.Recipe) -> str:
        """A KL acts on the advantages where it is in the rewards."""
        if self.where == "kl":
            return "advantages" if recipe.kl.kl_in_reward else "loss"
        return self.where


KL, TARGET = {"kl_coef": 0.3}, {"kl_coef": 0.3, "kl_target": 0.1}
TRUNCATE, ALL, BUFFER = {"correction": "truncate"}, {"cov_share": 1.0}, {"overlong_buffer": 0.5}
CHANGES = {
    "dynamic_sampling": Change("drawn", (True, False)),
    "max_draws": Change("drawn", (1,), {"dynamic_sampling": True}),
    "difficulty_low": Change("drawn", (0.4,)),
    "difficulty_high": Change("drawn", (0.4,)),
    "overlong_buffer": Change("shaped", (0.5,)),
    "overlong_factor": Change("shaped", (2.0,), BUFFER),
    "length_penalty": Change("shaped", (0.3,)),
    "running_norm": Change("shaped", ("standardize",)),
    "reward_clip": Change("shaped", (0.2,)),
    # What gae does not read must be as it is by default.
    "estimator": Change("advantages", ("gae", "group"), {"baseline": "mean", "scale": "std", "group_weight": "none"}),
    "baseline": Change("advantages", ("length", "none")),
    "scale": Change("advantages", ("none", "std")),
    # Without a scale, and whitened, these change nothing: a sum of differences is the difference of the sums.
    "aggregation": Change("advantages", ("normalize_then_sum",), {"scale": "std"}),
    "group_weight": Change("advantages", ("informative", "none"), {"whiten": False}),
    "group_weight_cap": Change("advantages", (1.0,), {"group_weight": "informative", "whiten": False}),
    "gamma": Change("advantages", (0.5,)),
    "lam": Change("advantages", (0.5,)),
    "length_alpha": Change("advantages", (0.5,)),
    "whiten": Change("advantages", (True, False)),
    "advantage_clip": Change("advantages", (0.1,)),
    "objective": Change("loss", ("dro", "cispo")),
    "level": Change("loss"),
    "clip_low": Change("loss", (0.05,)),
    "clip_high": Change("loss", (0.07,)),
    "dual_clip": Change("loss", (1.1,)),
    "ratio_cap": Change("loss", (1.5,)),
    "drift_coef": Change("loss", (0.5,)),
    "drift_clip": Change("loss", (0.3,)),
    "sapo_positive": Change("loss", (2.0,)),
    "sapo_negative": Change("loss", (2.0,)),
    "cov_share": Change("loss", (0.5,)),
    "cov_low": Change("loss", (-9.0,), ALL),
    "cov_high": Change("loss", (2.0,), ALL),
    "cov_coef": Change("loss", (0.4,)),
    "dro_coef": Change("loss", (0.4,)),
    "gvpo_coef": Change("loss", (0.4,)),
    "vespo_positive": Change("loss", ((1.0, 2.0),)),
    "vespo_negative": Change("loss", ((1.0, 2.0),)),
    "entropy_share": Change("loss", (0.5,)),
    "entropy_scope": Change("loss", ("sequence",), {"entropy_share": 0.5}),
    "correction": Change("loss", ("truncate", "mask")),
    "correction_level": Change("loss", ("sequence",), TRUNCATE),
    "correction_low": Change("loss", (0.9,), TRUNCATE),
    "correction_high": Change("loss", (1.1,), TRUNCATE),
    "sequence_mask": Change("loss", (0.01,)),
    "reduction": Change("loss", ("sequence_sum", "token_mean")),
    "constant_length": Change("loss", (9,), {"reduction": "constant"}),
    "kl_coef": Change("kl", (0.3,)),
    "kl_kind": Change("kl", ("k2", "k3"), KL),
    "kl_weighted": Change("kl", (True,), {**KL, "kl_in_reward": False}),
    "kl_in_reward": Change("advantages", (True, False), KL),
    "kl_target": Change("kl_coef", (0.1,), KL),
    "kl_horizon": Change("kl_coef", (50,), TARGET),
}

# ------------------------------------------------------------------ a pipeline over fixed data

GROUPS, GROUP, TIME = 4, 4, 6
RNG = np.random.default_rng(5)
SAMPLES = GROUPS * GROUP
LENGTHS = np.array([6, 2, 5, 1, 3, 6, 4, 2, 1, 5, 6, 3, 4, 4, 2, 3])
MASK = (np.arange(TIME) < LENGTHS[:, None]).astype(np.float32)
IDS = np.repeat(np.arange(GROUPS), GROUP)
COMPONENTS = np.round(RNG.uniform(size=(SAMPLES, 2)), 2).astype(np.float32)
COMPONENTS[IDS == 3] = 0.5  # A group of equal rewards.
WEIGHTS = np.array([1.0, 0.5], np.float32)
GREEDY = np.round(RNG.uniform(size=(GROUPS, 2)), 2).astype(np.float32)
LOGPROBS, NOISE, DRIFT, REFERENCE = RNG.normal(size=(4, SAMPLES, TIME)).astype(np.float32)
LOGPROBS = 2 * LOGPROBS - 4
ENTROPIES, VALUES = RNG.uniform(size=(2, SAMPLES, TIME)).astype(np.float32)
STREAM = np.array([[1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [0.2, 0.3], [1, 1]], np.float32)


def collect(start: int, count: int) -> RolloutBatch:
    """Groups of two, whose rewards repeat; most of them are all equal."""
    total = STREAM[np.arange(start, start + count) % len(STREAM)].reshape(-1)
    completion = Completion(token_ids=[1], logprobs=np.zeros(1), sampled_logprobs=None, finish_reason="stop")
    return RolloutBatch(
        prompts=[Prompt(start + i, "", "", [0], {}) for i in range(count)],
        completions=[completion] * len(total),
        texts=[""] * len(total),
        scores=Scores(total=total, components={"r": total}),
        group=2,
    )


@functools.cache
def drawn(filter: alg.GroupFilter) -> np.ndarray:
    """Prompts drawn, and for the first 40 whether they are trained on."""
    found = draw(collect, 0, 4, filter)
    trained = [float(i in found.groups and not found.dropped[i]) for i in range(found.prompts)]
    return np.array([found.prompts, *trained, *[0] * (40 - found.prompts)])


@functools.cache
def shaped(shaping: alg.RewardShaping, greedy: bool = False) -> np.ndarray:
    components, lengths = (GREEDY, LENGTHS[:GROUPS]) if greedy else (COMPONENTS, LENGTHS)
    seen = alg.moments(np.array([0.1, 0.4, 2.0], np.float32))
    return np.asarray(alg.shape_rewards(shaping, components @ WEIGHTS, lengths, TIME, seen)[0])


@functools.cache
def advantages(
    shaping: alg.RewardShaping, estimator: alg.AdvantageEstimator, kl_coef: float, kl_kind: str
) -> np.ndarray:
    outcome = alg.Outcome(
        rewards=shaped(shaping), components=COMPONENTS, weights=WEIGHTS, group_ids=IDS,
        greedy_rewards=shaped(shaping, greedy=True), greedy_components=GREEDY,
    )  # fmt: skip
    penalties = kl_coef * alg.kl(LOGPROBS, LOGPROBS + REFERENCE, kl_kind) if kl_coef else None
    with jax.disable_jit():
        return np.asarray(alg.estimate_advantages(estimator, outcome, GROUPS, jnp.asarray(MASK), penalties, VALUES))


@functools.cache
def loss(policy: alg.PolicyObjective, *of_advantages: Any) -> np.ndarray:
    """The loss, and its gradient: levels may have the same value."""

    def value(logprobs: jax.Array) -> jax.Array:
        return alg.policy_loss(
            policy,
            logprobs,
            LOGPROBS + NOISE,
            advantages(*of_advantages),
            jnp.asarray(MASK),
            sampler_logprobs=LOGPROBS + NOISE + DRIFT,
            entropies=ENTROPIES,
            ref_logprobs=LOGPROBS + REFERENCE,
            key=jax.random.key(0),
            group_ids=IDS,
            num_groups=GROUPS,
        )[0]

    found, gradient = jax.value_and_grad(value)(jnp.asarray(LOGPROBS))
    return np.append(np.asarray(gradient), found)


def next_kl_coef(policy: alg.PolicyObjective, control: alg.KLControl) -> np.ndarray:
    if control.kl_target is None:
        return np.array(policy.kl_coef)
    return np.array(alg.adaptive_kl_coef(policy.kl_coef, 0.5, control.kl_target, control.kl_horizon, 100))


def stages(recipe: alg.Recipe) -> dict[str, Callable[[], np.ndarray]]:
    """What comes out of each stage, in their order."""
    policy, in_reward = recipe.policy, recipe.kl.kl_in_reward
    of_advantages = (recipe.shaping, recipe.advantage, policy.kl_coef if in_reward else 0.0, policy.kl_kind)
    in_loss = dataclasses.replace(policy, kl_coef=0.0) if in_reward else policy
    return {
        "drawn": lambda: drawn(recipe.filter),
        "shaped": lambda: shaped(recipe.shaping),
        "advantages": lambda: advantages(*of_advantages),
        "loss": lambda: loss(in_loss, *of_advantages),
        "kl_coef": lambda: next_kl_coef(policy, recipe.kl),
    }


def first_difference(a: alg.Recipe, b: alg.Recipe) -> str | None:
    """The first stage whose result is another."""
    for (stage, ours), theirs in zip(stages(a).items(), stages(b).values()):
        found = ours(), theirs()
        assert all(np.isfinite(array).all() for array in found), stage
        if np.abs(found[0] - found[1]).max() > 1e-4:
            return stage
    return None
