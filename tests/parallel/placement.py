"""What each of 8 devices holds of a train state, by strategy: ``python -m tests.parallel.placement`` prints JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from jaxrft.parallel import describe
from tests.parallel import updates
from tests.training.learners import make_samples

# Wide, so that gradients outweigh activations; heads and channels that 2 devices divide.
SPEC = dataclasses.replace(
    updates.SPEC, vocab_size=2048, hidden_size=128, intermediate_size=256, num_heads=4, head_dim=16, num_layers=1
)


def held(tree: Any) -> list[int]:
    """Bytes on each device."""
    total: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return list(total.values())


def main() -> None:
    """A record for each strategy and tensor size."""
    updates.SPEC = SPEC
    for strategy in updates.STRATEGIES:
        for tensor, sequence in ((1, 1), (2, 2)):
            case = updates.Case(strategy, tensor, sequence, parts=2)
            learner = updates.learner_of(case)
            batch = learner.prepare(make_samples(updates.SAMPLES, vocab=64), score_old=False)
            arguments = (learner.state, batch, np.ones(2, np.float32), np.float32(0))
            compiled = learner._step.lower(*arguments).compile()
            # As for a GPU: lowered anew, in a learner of its own, and not compiled. Its kernels are nothing for a CPU.
            with (
                mock.patch("jax.default_backend", return_value="gpu"),
                mock.patch("jaxrft.models.logit_chunks.choose_way", return_value="plain"),
            ):
                lowered = updates.learner_of(case)._step.lower(*arguments)
            before = held((learner.state.params, learner.state.opt_state))
            list(learner.update(batch, 9, None))
            after = held((learner.state.params, learner.state.opt_state))
            names = [n for n, _ in nnx.to_flat_state(nnx.state(learner.model, nnx.Param))]
            sizes = {".".join(map(str, n)): v.size for n, v in zip(names, jax.tree.leaves(learner.state.params))}
            description = describe(learner.state.params, learner.layout, learner.state.opt_state)
            record = {
                "strategy": strategy,
                "tensor": tensor,
                "shards": learner.layout.mesh.shape["fsdp"] * sequence,
                "params": held(learner.state.params),
                "moments": held(learner.state.opt_state),
                "same": before == after,
                "temp": compiled.memory_analysis().temp_size_in_bytes,
                "barriers": lowered.as_text().count("optimization_barrier"),
                "sizes": sizes,
                "described": [description.param_bytes, description.gradient_bytes, description.moment_bytes],
                "whole": description.whole,
                "text": str(description),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
