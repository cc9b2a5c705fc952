"""A whole run on a mesh of all axes: engine, audit, checkpoints, resumption."""

import json

RUN = """
import json, sys
import numpy as np, jax
from pathlib import Path
from jaxrft import RLTrainer
from jaxrft.config import BatchingConfig, MemoryConfig, ParallelConfig
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config

folder = Path({folder!r})
parallel = ParallelConfig(strategy="fsdp", fsdp=2, sequence=2, tensor=2)
common = dict(
    parallel=parallel, beta=0.05, lr_scheduler_type="constant", save_steps=1, per_device_train_batch_size=4,
    batching=BatchingConfig(pack=True),
    memory=MemoryConfig(offload_optimizer=True, offload_reference=True, remat="save"),
)

def run(name, **changes):
    config = tiny_config(folder / name, **common | changes)
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS, eval_dataset=ROWS)
    metrics = trainer.train()
    return trainer, metrics

whole, metrics = run("whole")
run("parts", max_steps=2)
parts, resumed = run("parts", resume_from_checkpoint=True)
state = [jax.tree.leaves(t.learner.state) for t in (whole, parts)]
print(json.dumps({{
    "equal": all(np.array_equal(a, b) for a, b in zip(*state, strict=True)),
    "kinds": sorted({{leaf.sharding.memory_kind for leaf in jax.tree.leaves(whole.learner.state.opt_state)}}),
    "reference": sorted({{leaf.sharding.memory_kind for leaf in jax.tree.leaves(whole.learner.reference)}}),
    "shards": sorted({{leaf.size // leaf.addressable_shards[0].data.size
                      for leaf in jax.tree.leaves(whole.learner.state.params) if leaf.ndim == 2}}),
    "metrics": [metrics["grad_norm"], metrics["sampling/logprob_difference/max"], metrics["kl"]],
    "same": metrics["eval/reward"] == resumed["eval/reward"],
}}))
"""


def test_a_run_on_a_mesh_of_all_axes_resumes_bit_for_bit(tmp_path, run_python):
    found = json.loads(run_python(RUN.format(folder=str(tmp_path)), devices=8).stdout.splitlines()[-1])
    assert found["equal"]
    assert found["same"]
    assert found["kinds"] == ["pinned_host"]
    assert found["reference"] == ["pinned_host"]
    # The width of 16 over fsdp 2 x sequence 2, and heads, channels or vocabulary over tensor 2; one key head is whole.
    assert found["shards"] == [4, 8]
    grad_norm, gap, kl = found["metrics"]
    assert grad_norm > 0
    assert 0 < gap < 1e-4
    assert kl > 0
