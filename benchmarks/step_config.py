"""What a case of benchmarks/train_step.py is, and the config of a run that would do the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import step_shapes

from jaxrft.config import RLConfig
from jaxrft.config.rollout import RolloutConfig
from jaxrft.config.rooms import BatchingConfig, MemoryConfig, ModelConfig, ParallelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a step is measured for.

    Attributes:
        model: one of :data:`step_shapes.SHAPES`.
        length: tokens of the longest sample.
        dtype: of the computation.
        strategy: None: the one that shards most on the mesh.
        mesh: devices of each axis.
        remat, scan_layers: as in the config's ``memory``.
        packed: whether rows hold several samples.
        micro_batches: of a step; packed ones follow from the lengths.
        rows: samples of a device in a micro-batch.
        work: ``update``, an optimizer step, or ``logprobs``, the log-probability of every response token.
        param_dtype: of the parameters.
        offload_optimizer: whether the optimizer's moments lie in the host's memory.
    """

    model: str
    length: int
    dtype: str
    strategy: str | None
    mesh: dict[str, int]
    remat: str
    scan_layers: bool
    packed: bool
    micro_batches: int
    rows: int
    work: str = "update"
    param_dtype: str = "float32"
    offload_optimizer: bool = False

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.mesh.values())))


def config_of(case: Case) -> RLConfig:
    """GRPO's loss without a reference, on responses, with clipped gradients."""
    prompts = step_shapes.prompt_room(case.length)
    return RLConfig(
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        num_generations=1,
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=case.micro_batches,
        max_prompt_length=prompts,
        max_completion_length=case.length - prompts,
        model=ModelConfig(dtype=case.dtype, param_dtype=case.param_dtype),
        parallel=ParallelConfig(strategy=case.strategy, **case.mesh),
        memory=MemoryConfig(remat=case.remat, scan_layers=case.scan_layers, offload_optimizer=case.offload_optimizer),
        batching=BatchingConfig(pack=case.packed),
        rollout=RolloutConfig(max_slots=1),
    )
