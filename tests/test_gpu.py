"""What must hold on an NVIDIA GPU; elsewhere these tests are skipped."""

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import ModelConfig
from tests.rollout.servers import vllm_python
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_passes_its_audit(tmp_path, dtype):
    """float32 is float32: with matmuls in TF32, engine and trainer would differ by far more than the audit allows."""
    model = ModelConfig(scratch=SCRATCH, tokenizer=MODEL.tokenizer, dtype=dtype)
    config = tiny_config(tmp_path / "run", model=model, beta=0.01, max_steps=3)
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    metrics = trainer.train()
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["peak_memory_bytes"] > 0
    # Not popped from the set of devices, which is JAX's own.
    assert {d.platform for leaf in jax.tree.leaves(trainer.learner.state.params) for d in leaf.devices()} == {"gpu"}
    limit = 1e-4 if dtype == "float32" else 5e-2
    assert metrics["sampling/logprob_difference/mean"] < limit


VLLM_RUN = """
import sys
from jaxrft import RLTrainer
from jaxrft.config import ModelConfig, ParallelConfig, RolloutConfig, VLLMConfig
from tests.training.tiny import ROWS, digits, tiny_config

shape = {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
config = tiny_config(
    sys.argv[1],
    model=ModelConfig(scratch=shape, tokenizer="characters:0123456789+=", dtype="bfloat16"),
    parallel=ParallelConfig(memory_fraction=0.3),
    rollout=RolloutConfig(
        engine="vllm",
        parity="always",
        vllm=VLLMConfig(python=sys.argv[2], gpu_memory=0.3, eager=True, checksum=True, sleep=True),
    ),
    max_steps=3,
)
trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
metrics = trainer.train()
print("transport", trainer.engine.transport, "sleeps", trainer.engine.sleeps, "bytes", metrics["weights/bytes"])
trainer.close()
"""


def test_a_run_with_vllm_on_the_same_gpu(run_python, tmp_path):
    """Weights by CUDA IPC after every step, each followed by a comparison; the server sleeps while training runs."""
    code = f"import sys; sys.argv[1:] = [{str(tmp_path / 'run')!r}, {vllm_python()!r}]\n{VLLM_RUN}"
    printed = run_python(code, timeout=900).stdout
    assert "transport cuda_ipc sleeps True" in printed
    assert "parity: engine and trainer agree" in printed


def test_logits_equal_the_cpu(tmp_path):
    from jaxrft import models

    model = models.from_config(SCRATCH | {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128})
    tokens = np.random.default_rng(0).integers(0, 50, (4, 24))
    on_gpu = np.asarray(model(tokens))
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = np.asarray(
            models.from_config(SCRATCH | {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128})(tokens)
        )
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-4)
