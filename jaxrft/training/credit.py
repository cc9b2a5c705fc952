"""From the scores of a rollout to the advantages of its tokens, and the state that this keeps from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
        seen = dataclasses.astuple(self._seen)
        return {"kl_coef": float(self.kl_coef), "reward_moments": [float(value) for value in seen]}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave. A weight that is not adapted is the config's, not the saved one."""
        self._seen = alg.Moments(*(np.float32(value) for value in state["reward_moments"]))
        if self.recipe.kl.kl_target is not None:
            self.kl_coef = state["kl_coef"]

    def outcome(self, drawn: Drawn, greedy: RolloutBatch | None) -> alg.Outcome:
        """The rewards of the samples that are trained on, shaped; in the order of ``drawn.samples``.

        Args:
            drawn: a rollout, and what of it is trained on.
            greedy: one greedy completion of each of ``drawn.groups``, where the recipe asks for it.
        """
        chosen = drawn.rollout.select(drawn.groups)
        # A group that is left out must not count in means over the batch either.
        left_out = np.repeat(drawn.dropped[drawn.groups], chosen.group)
        rewards, components, self._seen = self._shaped(chosen, left_out, update=True)
        by_greedy = greedy_components = None
        if greedy is not None:  # Measured as the rewards that it is subtracted from are.
            kept = np.zeros(len(greedy.texts), bool)
            by_greedy, greedy_components, _ = self._shaped(greedy, kept, update=False)
        return alg.Outcome(
            rewards=rewards,
            components=components,
            weights=np.append(self.weights, np.float32(1.0)),
            group_ids=np.repeat(np.arange(len(drawn.groups), dtype=np.int32), chosen.group),
            greedy_rewards=by_greedy,
            greedy_components=greedy_components,
        )

    def assign(self, batch: TrainBatch, outcome: alg.Outcome, groups: int) -> tuple[TrainBatch, Float[Array, ""]]:
        """The batch with advantages, and the mean KL to the reference that they hold (0 where it is in the loss).

        Args:
            batch: with the policy's and the reference's log-probabilities where the KL goes into the rewards.
            outcome: of its samples, in the order of the list that it was made from.
            groups: number of them.
        """
        coef = jnp.float32(self.kl_coef if self.recipe.kl.kl_in_reward else 0.0)
        advantages, kl = _assign(self.recipe, groups, batch, outcome, coef)
        placed = jax.device_put(advantages, jnp.asarray(batch.mask).sharding)
        return dataclasses.replace(batch, advantages=placed), kl

    def adapt(self, observed_kl: float, samples: int) -> None:
        """Moves the KL's weight after a rollout, where the recipe has a target for it."""
        control = self.recipe.kl
        if control.kl_target is not None and np.isfinite(observed_kl):
            self.kl_coef = alg.adaptive_kl_coef(
                self.kl_coef, observed_kl, control.kl_target, control.kl_horizon, samples
            )

    def _shaped(
        self, rollout: RolloutBatch, left_out: np.ndarray, update: bool
    ) -> tuple[np.ndarray, np.ndarray, alg.Moments]:
        """Rewards; each of them, and what the length adds as one more, [samples, rewards + 1]; and the moments seen."""
        total = np.where(left_out, np.nan, rollout.scores.total).astype(np.float32)
        arguments = self.recipe.shaping, total, rollout.lengths, self.max_length, self._seen
        rewards, terms, seen = jax.device_get(_shape(*arguments, update=update))
        components = np.stack([*rollout.scores.components.values(), terms], axis=1).astype(np.float32)
        return rewards, np.where(left_out[:, None], np.nan, components), seen


@jax.jit(static_argnums=(0, 3), static_argnames="update")
def _shape(
    shaping: alg.RewardShaping,
    rewards: Float[Array, "samples"],
    lengths: Int[Array, "samples"],
    max_length: int,
    seen: alg.Moments,
    *,
    update: bool,
) -> tuple[Float[Array, "samples"], Float[Array, "samples"], alg.Moments]:
    """Shaped rewards, what the length adds to each, and the moments seen: one program for a run's first step."""
    shaped, seen = alg.shape_rewards(shaping, rewards, lengths, max_length, seen, update)
    return shaped, alg.length_terms(shaping, lengths, max_length), seen


def permuted(outcome: alg.Outcome, order: Sequence[int]) -> alg.Outcome:
    """An outcome with its samples in another order."""
    chosen = np.asarray(order, int)
    return outcome._replace(
        rewards=outcome.rewards[chosen], components=outcome.components[chosen], group_ids=outcome.group_ids[chosen]
    )


@jax.jit(static_argnums=(0, 1))
def _assign(
    recipe: alg.Recipe, groups: int, batch: TrainBatch, outcome: alg.Outcome, kl_coef: Float[Array, ""]
) -> tuple[Float[Array, "parts samples response"], Float[Array, ""]]:
    # The list's order, without empty places.
    order = list_order(batch.sample_ids)[: outcome.rewards.shape[0]]

    def listed(array):
        return array.reshape(-1, array.shape[-1])[order]

    mask = listed(batch.mask)
    penalties, mean = None, jnp.zeros(())
    if recipe.kl.kl_in_reward and batch.ref_logprobs is not None:
        kl = alg.kl(listed(batch.old_logprobs), listed(batch.ref_logprobs), recipe.policy.kl_kind)
        kl = jnp.where(mask > 0, kl, 0.0)
        penalties, mean = kl_coef * kl, jnp.sum(kl) / jnp.maximum(jnp.sum(mask), 1.0)
    advantages = alg.estimate_advantages(recipe.advantage, outcome, groups, mask, penalties)
    places = jnp.zeros((batch.sample_ids.size, mask.shape[-1]), advantages.dtype)
    return places.at[order].set(advantages).reshape(batch.mask.shape), mean
