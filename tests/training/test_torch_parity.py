"""Whole updates against an independent implementation in torch: its AdamW, clipping and schedules."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jaxrft import models
from jaxrft.config import RLConfig
from jaxrft.parallel import Layout, make_mesh
from jaxrft.training.batch import Sample
from jaxrft.training.learner import Learner
from jaxrft.training.parts import build_recipe

UPDATES, GROUP, SAMPLES, TEMPERATURE = 3, 4, 8, 0.7
SETTINGS = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "max_grad_norm": 0.05,
    "beta": 0.1,
    "epsilon": 0.1,
    "epsilon_high": 0.15,
}


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("qwen2")
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():  # Biases start at 0 and norms at 1: as they are in no trained model.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def random_samples(seed):
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(SAMPLES):
        prompt, response = rng.integers(1, 31, rng.integers(1, 6)), rng.integers(1, 31, rng.integers(1, 9))
        samples.append(
            Sample(
                prompt_ids=prompt.tolist(),
                response_ids=response.tolist(),
                logprobs=np.zeros(len(response)),
                advantage=float(rng.normal()),
                trained=bool(rng.random() > 0.15),
            )
        )
    return samples


def torch_logprobs(model, sample):
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(ids).logits[0] / TEMPERATURE
    every = torch.log_softmax(logits.float(), -1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return every[len(sample.prompt_ids) - 1 :]


def torch_loss(model, reference, samples, old, loss_type, longest):
    """The sum over responses, written out sample by sample."""
    kept = [(s, o) for s, o in zip(samples, old) if s.trained]
    tokens = sum(len(s.response_ids) for s, _ in kept)
    total = 0.0
    for sample, before in kept:
        now = torch_logprobs(model, sample)
        ratio = torch.exp(now - before)
        clipped = torch.clamp(ratio, 1 - SETTINGS["epsilon"], 1 + SETTINGS["epsilon_high"])
        loss = -torch.min(ratio * sample.advantage, clipped * sample.advantage)
        with torch.no_grad():
            base = torch_logprobs(reference, sample)
        loss = loss + SETTINGS["beta"] * (torch.exp(base - now) - (base - now) - 1)
        divisor = {
            "dapo": tokens,
            "grpo": len(loss) * len(kept),
            "dr_grpo": longest * len(kept),
        }[loss_type]
        total = total + loss.sum() / divisor
    return total


def train_in_torch(folder, iterations, loss_type, longest):
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=SETTINGS["learning_rate"], betas=(0.9, SETTINGS["adam_beta2"]), eps=SETTINGS["adam_epsilon"]
    )
    schedule = transformers.get_scheduler(
        SETTINGS["lr_scheduler_type"], optimizer, SETTINGS["warmup_steps"], UPDATES * iterations
    )
    norms = []
    for update in range(UPDATES):
        samples = random_samples(update)
        with torch.no_grad():
            old = [torch_logprobs(model, s) for s in samples]
        for _ in range(iterations):
            optimizer.zero_grad()
            torch_loss(model, reference, samples, old, loss_type, longest).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])))
            optimizer.step()
            schedule.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize(
    ("micro_batches", "iterations", "loss_type"), [(1, 1, "grpo"), (4, 2, "dapo"), (4, 1, "dr_grpo")]
)
def test_updates_equal_torch(torch_folder, tmp_path, micro_batches, iterations, loss_type):
    config = RLConfig(
        **SETTINGS,
        loss_type=loss_type,
        temperature=TEMPERATURE,
        num_generations=GROUP,
        num_iterations=iterations,
        per_device_train_batch_size=SAMPLES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_completion_length=10,
    )
    learner = Learner(
        config, build_recipe(config), models.load(str(torch_folder)), Layout(make_mesh()), UPDATES * iterations
    )
    learner.keep_reference()
    norms = []
    for update in range(UPDATES):
        batch = learner.prepare(random_samples(update), score_old=True)
        norms += [stats["grad_norm"] for stats in learner.update(batch, 99, None)]
    learner.publish()
    models.save(learner.model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs, their_norms = train_in_torch(torch_folder, iterations, loss_type, config.max_completion_length)
    np.testing.assert_allclose(norms, their_norms, rtol=1e-4)
    assert set(ours) == set(theirs)
    start = load_file(torch_folder / "model.safetensors")
    for name, expected in theirs.items():
        assert np.abs(expected - start[name]).max() > 1e-4, f"{name} was not trained"
        assert np.abs(ours[name] - expected).max() <= 1e-5 * np.abs(expected).max(), name
