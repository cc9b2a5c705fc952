"""From the scores of a rollout to the advantages of its tokens, and the state that this keeps from step to step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrft import algorithms as alg
from jaxrft.training.batch import TrainBatch, list_order
from jaxrft.training.drawing import Drawn
from jaxrft.training.rollouts import RolloutBatch


class Credit:
    """Gives each token its advantage, as a recipe says.

    Args:
        recipe: the algorithm.
        weights: of each reward in the total.
        max_length: tokens of the longest completion allowed.
    """

    def __init__(self, recipe: alg.Recipe, weights: Sequence[float], max_length: int):
        self.recipe, self.max_length = recipe, max_length
        self.weights = np.asarray(weights, np.float32)
        self.kl_coef = recipe.policy.kl_coef
        self._seen = alg.no_moments()

    def state(self) -> dict[str, Any]:
        """What must be saved with a run, as plain values."""
        seen = self._seen.count, self._seen.mean, self._seen.m2
        return {"kl_coef": float(self.kl_coef), "reward_moments": [float(value) for value in seen]}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave. A weight that is not adapted is the config's, not the saved one."""
        self._seen = alg.Moments(*(np.float32(value) for value in state["reward_moments"]))
        if self.recipe.kl.kl_target is not None:
            self.kl_coef = state["kl_coef"]

    def assign(
        self, batch: TrainBatch, drawn: Drawn, greedy: RolloutBatch | None, order: Sequence[int]
    ) -> tuple[TrainBatch, Float[Array, ""]]:
        """The batch with advantages, and the mean KL to the reference that they hold (0 where it is in the loss).

        Args:
            batch: with the policy's and the reference's log-probabilities where the KL goes into the rewards.
            drawn: a rollout, and what of it is trained on.
            greedy: one greedy completion of each of ``drawn.groups``, where the recipe asks for it.
            order: index among ``drawn.samples`` of each sample of the list that the batch was made from.
        """
        chosen = drawn.rollout.select(drawn.groups)
        # A group that is left out must not count in means over the batch either.
        left_out = np.repeat(drawn.dropped[drawn.groups], chosen.group)
        in_reward = self.recipe.kl.kl_in_reward and batch.ref_logprobs is not None
        advantages, kl, self._seen = _assign(
            self.recipe,
            self.max_length,
            len(drawn.groups),
            batch.sample_ids,
            batch.mask,
            (batch.old_logprobs, batch.ref_logprobs, np.float32(self.kl_coef)) if in_reward else None,
            scored=_Scored.of(chosen, left_out),
            # Measured as the rewards that it is subtracted from are.
            greedy=None if greedy is None else _Scored.of(greedy),
            order=np.asarray(order, np.int32),
            weights=np.append(self.weights, np.float32(1.0)),
            # From the host: where the last program left them they would be arguments of another kind.
            seen=jax.tree.map(np.float32, self._seen),
        )
        placed = jax.device_put(advantages, jnp.asarray(batch.mask).sharding)
        return dataclasses.replace(batch, advantages=placed), kl

    def adapt(self, observed_kl: float, samples: int) -> None:
        """Moves the KL's weight after a rollout, where the recipe has a target for it."""
        control = self.recipe.kl
        if control.kl_target is not None and np.isfinite(observed_kl):
            self.kl_coef = alg.adaptive_kl_coef(
                self.kl_coef, observed_kl, control.kl_target, control.kl_horizon, samples
            )


class _Scored(NamedTuple):
    """The rewards of some samples as they were scored; NaN where none applies.

    Attributes:
        total: of all rewards, weighted.
        components: each of them.
        lengths: tokens of each response.
        left_out: whether a sample must not count in means over the batch.
    """

    total: Float[np.ndarray, "samples"]
    components: Float[np.ndarray, "samples rewards"]
    lengths: Int[np.ndarray, "samples"]
    left_out: Bool[np.ndarray, "samples"]

    @classmethod
    def of(cls, rollout: RolloutBatch, left_out: Bool[np.ndarray, "samples"] | None = None) -> _Scored:
        """Those of a rollout; None leaves nothing out."""
        total, components = rollout.scores.total, np.stack([*rollout.scores.components.values()], axis=1)
        left_out = np.zeros(len(total), bool) if left_out is None else left_out
        return cls(total.astype(np.float32), components.astype(np.float32), rollout.lengths, left_out)

    def shaped(
        self, shaping: alg.RewardShaping, max_length: int, seen: alg.Moments, update: bool
    ) -> tuple[Float[Array, "samples"], Float[Array, "samples rewards+1"], alg.Moments]:
        """Shaped totals; each reward, and what the length adds as one more; and the moments seen."""
        total = jnp.where(self.left_out, jnp.nan, self.total)
        total, seen = alg.shape_rewards(shaping, total, self.lengths, max_length, seen, update)
        terms = alg.length_terms(shaping, self.lengths, max_length)
        components = jnp.concatenate([self.components, terms[:, None]], axis=1)
        return total, jnp.where(self.left_out[:, None], jnp.nan, components), seen


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _assign(
    recipe: alg.Recipe,
    max_length: int,
    groups: int,
    sample_ids: Int[Array, "parts samples"],
    mask: Float[Array, "parts samples response"],
    penalised: tuple[Array, Array, Float[Array, ""]] | None,
    *,
    scored: _Scored,
    greedy: _Scored | None,
    order: Int[Array, "samples"],
    weights: Float[Array, "rewards+1"],
    seen: alg.Moments,
) -> tuple[Float[Array, "parts samples response"], Float[Array, ""], alg.Moments]:
    """Advantages, the mean KL that they hold, and the moments seen: one program for padded rows of all lengths.

    Args:
        penalised: log-probabilities of policy and reference, and the KL's weight, where it goes into the rewards.
    """
    rewards, components, after = scored.shaped(recipe.shaping, max_length, seen, update=True)
    outcome = alg.Outcome(
        rewards=rewards[order],
        components=components[order],
        weights=weights,
        group_ids=order // (rewards.shape[0] // groups),
    )
    if greedy is not None:
        by_greedy, greedy_components, _ = greedy.shaped(recipe.shaping, max_length, after, update=False)
        outcome = outcome._replace(greedy_rewards=by_greedy, greedy_components=greedy_components)
    # The list's order, without empty places.
    places = list_order(sample_ids)[: rewards.shape[0]]

    def listed(array):
        return array.reshape(-1, array.shape[-1])[places]

    tokens = listed(mask)
    penalties, mean = None, jnp.zeros(())
    if penalised is not None:
        old, reference, coef = penalised
        kl = jnp.where(tokens > 0, alg.kl(listed(old), listed(reference), recipe.policy.kl_kind), 0.0)
        penalties, mean = coef * kl, jnp.sum(kl) / jnp.maximum(jnp.sum(tokens), 1.0)
    found = alg.estimate_advantages(recipe.advantage, outcome, groups, tokens, penalties)
    empty = jnp.zeros((sample_ids.size, tokens.shape[-1]), found.dtype)
    return empty.at[places].set(found).reshape(mask.shape), mean, after
