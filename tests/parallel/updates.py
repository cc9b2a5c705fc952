"""Three GRPO updates of one small model under many layouts, each compared with those on one device.

``python -m tests.parallel.updates fast|all`` prints one JSON record a case; it wants 16 devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from typing import Any

import numpy as np
from flax import nnx

from jaxrft.config import BatchingConfig, MemoryConfig, ParallelConfig, RLConfig
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.stack import Remat
from jaxrft.training.learner import Learner
from jaxrft.training.parts import build_layout, build_recipe
from tests.training.learners import difference, host, make_samples

VOCAB, SAMPLES, STEPS = 64, 16, 3
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "hsdp")
REMATS = ("none", "full", "save", "offload")
# Fewer key heads than devices of tensor parallelism, biases, and two kinds of mask.
SPEC = DecoderSpec(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
    sliding_windows=(None, 6),
    init_stddev=0.2,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout, and how the step is computed on it."""

    strategy: str = "ddp"
    tensor: int = 1
    sequence: int = 1
    remat: str = "none"
    scan: bool = False
    pack: bool = False
    parts: int = 1
    offload: bool = False
    tied: bool = False
    alone: bool = False

    @property
    def parallel(self) -> ParallelConfig:
        """On 8 devices; with tensor 4, hsdp needs 16 to have both replicas and shards."""
        if self.alone:
            return ParallelConfig()
        devices = 16 if self.strategy == "hsdp" and self.tensor == 4 else 8
        data = devices // (self.tensor * self.sequence)
        sizes = {"ddp": (data, 1), "hsdp": (2, data // 2)}.get(self.strategy, (1, data))
        return ParallelConfig(
            strategy=self.strategy, replica=sizes[0], fsdp=sizes[1], tensor=self.tensor, sequence=self.sequence
        )


def fast_cases() -> list[Case]:
    """Every strategy with every tensor size; the other settings so that each pair of values occurs."""
    cases = []
    for number, (strategy, tensor) in enumerate(itertools.product(STRATEGIES, (1, 2, 4))):
        turn = 5 * (number // 3) + number % 3
        cases.append(
            Case(
                strategy,
                tensor,
                sequence=1 + turn % 2,
                remat=REMATS[turn % 4],
                scan=turn % 3 == 0,
                pack=number % 2 == 1,
                parts=1 + (number // 2) % 2,
                offload=number % 4 == 3,
                tied=number % 5 == 1,
            )
        )
    return cases


def all_cases() -> list[Case]:
    """Every strategy, tensor and sequence size; beside each, settings drawn at random."""
    rng = np.random.default_rng(0)
    cases = []
    for strategy, tensor, sequence in itertools.product(STRATEGIES, (1, 2, 4), (1, 2)):
        scan, pack, offload, tied = (bool(rng.integers(2)) for _ in range(4))
        remat, parts = REMATS[rng.integers(4)], int(rng.integers(1, 3))
        cases += [
            Case(strategy, tensor, sequence),
            Case(strategy, tensor, sequence, remat, scan, pack, parts, offload, tied),
        ]
    return cases


def learner_of(case: Case, **changes: Any) -> Learner:
    """At its start, with a reference."""
    parallel = case.parallel
    settings = {
        "learning_rate": 0.1, "adam_epsilon": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.1,
        "max_grad_norm": 0.5, "beta": 0.1, "num_generations": 1, "temperature": 0.8, "max_prompt_length": 4,
        "max_completion_length": 12, "per_device_train_batch_size": SAMPLES // parallel.data_devices // case.parts,
        "gradient_accumulation_steps": case.parts, "parallel": parallel, "batching": BatchingConfig(pack=case.pack),
        "memory": MemoryConfig(offload_optimizer=case.offload, offload_reference=case.offload),
    }  # fmt: skip
    config = RLConfig(**settings | changes)
    model = Decoder(dataclasses.replace(SPEC, tie_embeddings=case.tied), rngs=nnx.Rngs(0))
    model.remat, model.scan_layers = Remat(case.remat), case.scan
    learner = Learner(config, build_recipe(config), model, build_layout(config), total_steps=STEPS)
    learner.keep_reference()
    return learner


def run(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[dict[str, float]]]:
    """Parameters before and after, moments, and the statistics of each update."""
    learner = learner_of(case)
    before, stats = host(learner.state.params), []
    for step in range(STEPS):
        samples = make_samples(SAMPLES, seed=step, vocab=VOCAB)
        stats += list(learner.update(learner.prepare(samples, score_old=True), 99, None))
    return before, host(learner.state.params), host(learner.state.opt_state), stats


def compare(case: Case, alone: Any) -> dict[str, float]:
    """How far a case is from the same updates on one device, relative."""
    (before, params, moments, stats), (_, expected, expected_moments, expected_stats) = run(case), alone
    pairs = list(zip(stats, expected_stats, strict=True))
    return {
        "params": difference(params, expected, before),
        "moments": difference(moments, expected_moments, [np.zeros_like(m) for m in moments]),
        **{
            name: max(abs(a[name] - b[name]) for a, b in pairs) / max(abs(b[name]) for _, b in pairs)
            for name in ("loss", "grad_norm", "kl")
        },
    }


def main(which: str) -> None:
    """Prints a record of each case."""
    alone = {tied: run(Case(alone=True, tied=tied)) for tied in (False, True)}
    for case in {"fast": fast_cases, "all": all_cases}[which]():
        print(json.dumps({"case": dataclasses.asdict(case), **compare(case, alone[case.tied])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
