"""Which recipes fit a run."""

from __future__ import annotations

from jaxrft.algorithms import Recipe
from jaxrft.config import ConfigError, RLConfig


def check_recipe(config: RLConfig, recipe: Recipe) -> None:
    """Refuses what this trainer cannot do, or not with these batches, or not with what its engine samples from.

    Raises:
        ConfigError: such a recipe.
    """
    if recipe.advantage.estimator == "gae":
        field, other = ("recipe", "grpo") if config.algorithm.estimator is None else ("estimator", "group")
        raise ConfigError(
            f"algorithm.{field}: {getattr(config.algorithm, field)} needs a critic, which this version does not have; "
            f"takes another, such as {other}"
        )
    if recipe.policy.grouped and config.batching.pack:
        raise ConfigError(
            f"batching.pack: set with objective {recipe.policy.objective}, which compares the samples of a group; "
            "packing does not keep groups together: remove it"
        )
    rows = config.per_device_train_batch_size * config.parallel.data_devices
    if recipe.policy.grouped and rows % config.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size: got {rows} completions in a micro-batch, takes a multiple of "
            f"num_generations ({config.num_generations}) with objective {recipe.policy.objective}, which compares "
            "those of a group"
        )
    if config.rollout.quantization != "none" and recipe.policy.correction == "none" and not config.algorithm.correction:
        raise ConfigError(
            f"rollout.quantization: {config.rollout.quantization} samples from other probabilities than the trainer's, "
            "which the recipe does not correct; set algorithm.correction=truncate, or none to train regardless"
        )
