"""tunix's side of benchmarks/grpo_step.py: ``GRPOLearner`` with its own sampler, one global step a turn."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpo_case
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerFast
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from turns import Turns, order


def main() -> None:
    turns, wanted = Turns(), order()
    case, folder = grpo_case.read(wanted["case"]), Path(wanted["folder"])
    if jax.default_backend() != wanted["platform"]:
        raise RuntimeError(f"its JAX runs on {jax.default_backend()}, jaxrft's on {wanted['platform']}")
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    # It wants such a token. Past the model's vocabulary it is never drawn.
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    with mesh:
        model = create_model_from_safe_tensors(str(folder / "model"), model_config(case), mesh, jnp.float32)
        cluster = RLCluster(actor=model, tokenizer=tokenizer, cluster_config=cluster_config(case, mesh))
        algorithm = GRPOConfig(num_generations=case.group, num_iterations=1, beta=0.0, epsilon=0.2)
        learner = GRPOLearner(cluster, algorithm, reward(case))
        take_turns(learner, turns)
        learner.train(batches(case))


def model_config(case: grpo_case.Case) -> ModelConfig:
    fields = case.model
    return ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=fields["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=fields["tie_word_embeddings"],
        dtype=jnp.dtype(case.dtype),
    )


def cluster_config(case: grpo_case.Case, mesh: jax.sharding.Mesh) -> ClusterConfig:
    """The same optimizer as the other sides'; nothing evaluated or saved. Its batches count prompts."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.999, weight_decay=0.0))
    length = case.prompt_length + case.new_tokens
    return ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        training_config=RLTrainingConfig(
            actor_optimizer=optimizer,
            eval_every_n_steps=10**6,
            max_steps=10**6,
            mini_batch_size=case.prompts,
            train_micro_batch_size=max(1, case.micro_batch // case.group),
            rollout_micro_batch_size=case.prompts,
            compute_logps_micro_batch_size=case.prompts,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=case.new_tokens,
            max_prompt_length=case.prompt_length,
            kv_cache_size=length,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
        ),
    )


def reward(case: grpo_case.Case) -> Any:
    """As its learner calls rewards: with prompts, and with more by name."""
    score = grpo_case.make_reward(case)
    return lambda prompts, completions, **_: score(completions)


def batches(case: grpo_case.Case) -> Iterator[dict[str, np.ndarray]]:
    prompts = np.array(grpo_case.make_prompts(case))
    for start in itertools.cycle(range(0, len(prompts), case.prompts)):
        yield {"prompts": prompts[start : start + case.prompts]}


def take_turns(learner: GRPOLearner, turns: Turns) -> None:
    """Makes every step wait for its turn."""
    cluster = learner.rl_cluster
    step = learner._run_global_step
    cluster.generate = turns.timed("rollout", cluster.generate)
    learner._compute_rewards = turns.timed("rewards", learner._compute_rewards)
    learner._generate_and_compute_advantage = turns.timed("preparation", learner._generate_and_compute_advantage)

    def describe(seconds: float) -> dict[str, Any]:
        phases = {name: turns.seconds[name] for name in ("rollout", "rewards")}
        # All but the making of a batch, which is done before: losses, gradients, the optimizer.
        phases["training"] = seconds - turns.seconds["preparation"]
        versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
        return {"phases": phases, "versions": versions, "threads": len(os.sched_getaffinity(0))}

    def run(*arguments: Any) -> None:
        turns.next(describe, lambda: jax.block_until_ready(nnx.state(cluster.actor_trainer.model)))
        step(*arguments)

    learner._run_global_step = run


if __name__ == "__main__":
    main()
