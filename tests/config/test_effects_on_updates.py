"""What the fields of updates and sampling change that can be observed: each against a formula or another value."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft.config import ConfigError, RLConfig, WarmStartConfig
from jaxrft.config.parse import from_dict
from jaxrft.data.records import Prompt
from jaxrft.rollout import Completion
from jaxrft.training import learner, warm_start
from jaxrft.training.batch import Sample
from jaxrft.training.optimizer import adamw, clip_by_norm, schedule
from jaxrft.training.rollouts import RolloutBatch, evaluation_sampling, make_samples, training_sampling
from tests.training.tiny import ROWS, digits, tiny_config


def warm(steps, peak, total, after):
    """The learning rate of each step: a rise from zero, then a course from 1 at its end."""
    return [peak * (t / steps if t < steps else after((t - steps) / (total - steps))) for t in range(total)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learning_rate": 0.5}, warm(0, 0.5, 10, lambda p: 1 - p)),
        ({"lr_scheduler_type": "cosine"}, warm(0, 1, 10, lambda p: (1 + np.cos(np.pi * p)) / 2)),
        ({"lr_scheduler_type": "constant"}, [1.0] * 10),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, warm(4, 1, 10, lambda p: 1)),
        ({"warmup_steps": 5}, warm(5, 1, 10, lambda p: 1 - p)),
        ({"warmup_ratio": 0.3}, warm(3, 1, 10, lambda p: 1 - p)),
    ],
)
def test_schedule(values, expected):
    course = schedule(RLConfig(**{"learning_rate": 1.0, **values}), total_steps=10)
    np.testing.assert_allclose([course(step) for step in range(10)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "values", [{"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_epsilon": 0.1}, {"weight_decay": 0.3}]
)
def test_adamw(values):
    """Two steps of AdamW by its paper; decay on matrices only."""
    config = RLConfig(**values)
    params = {"matrix": np.array([[2.0, -1.0]]), "bias": np.array([3.0])}
    optimizer = adamw(config)
    state = optimizer.init(params)
    first, second = (
        {name: np.zeros_like(p) for name, p in params.items()},
        {n: np.zeros_like(p) for n, p in params.items()},
    )
    for step, scale in enumerate((1.0, -0.2), start=1):
        gradients = {name: scale * p for name, p in params.items()}
        directions, state = optimizer.update(gradients, state, params)
        for name, g in gradients.items():
            first[name] = config.adam_beta1 * first[name] + (1 - config.adam_beta1) * g
            second[name] = config.adam_beta2 * second[name] + (1 - config.adam_beta2) * g**2
            m, v = first[name] / (1 - config.adam_beta1**step), second[name] / (1 - config.adam_beta2**step)
            decay = config.weight_decay * params[name] if name == "matrix" else 0.0
            np.testing.assert_allclose(directions[name], m / (np.sqrt(v) + config.adam_epsilon) + decay, rtol=1e-4)


def test_max_grad_norm(tmp_path, monkeypatch):
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for limit, expected in ((1.0, 0.6), (2.5, 1.5), (100.0, 3.0), (0.0, 3.0)):
        np.testing.assert_allclose(clip_by_norm(gradients, jnp.array(5.0), limit)["a"], [expected], rtol=1e-5)
    limits = []
    monkeypatch.setattr(learner, "make_train_step", lambda *arguments, **_: limits.append(arguments[-1]))
    RLTrainer(config=tiny_config(tmp_path, max_grad_norm=0.25), reward_funcs=digits, train_dataset=ROWS)
    assert limits == [0.25]


BATCHES = [  # Values -> completions and prompts of a rollout, micro-batches and updates made of it.
    ({}, (8, 1, 1, 1)),
    ({"per_device_train_batch_size": 16}, (16, 2, 1, 1)),
    ({"gradient_accumulation_steps": 4}, (32, 4, 4, 1)),
    ({"steps_per_generation": 4}, (32, 4, 4, 4)),
    ({"generation_batch_size": 32}, (32, 4, 4, 4)),
    ({"generation_batch_size": 32, "gradient_accumulation_steps": 2}, (32, 4, 4, 2)),
    ({"num_generations": 4}, (8, 2, 1, 1)),
    ({"num_iterations": 3}, (8, 1, 1, 3)),
    ({"parallel": {"replica": 2}}, (16, 2, 1, 1)),
]


@pytest.mark.parametrize(("values", "expected"), BATCHES)
def test_batches(values, expected):
    """How a rollout is cut up; that the updates are the same however it is, is shown against torch."""
    config = from_dict(values)
    assert (
        config.rollout_samples,
        config.rollout_prompts,
        config.micro_batches,
        config.updates_per_rollout,
    ) == expected


PACKING = [  # Values of batching -> micro-batches, rows and tokens of a row, for samples of 13, 5, 5, ... tokens.
    ({}, (2, 8, 16)),
    ({"pack": True}, (1, 8, 16)),
    ({"pack": True, "tokens_per_device": 40}, (3, 2, 16)),
    ({"pack": True, "tokens_per_device": 16}, (6, 1, 16)),
    ({"pack": True, "row_length": 64}, (1, 2, 64)),
    ({"pack": True, "row_length": 24, "tokens_per_device": 24}, (6, 1, 24)),  # Of which 5 are used.
]


@pytest.mark.parametrize(("values", "expected"), PACKING)
def test_packing(values, expected):
    """88 tokens in all; that the updates are the same is shown with the trainer's tests."""
    config = from_dict({
        "max_prompt_length": 9, "max_completion_length": 4, "gradient_accumulation_steps": 2, "batching": values,
    })  # fmt: skip
    short = [Sample(prompt_ids=[1] * 3, response_ids=[2] * 2, logprobs=np.zeros(2))] * 15
    long = Sample(prompt_ids=[1] * 9, response_ids=[2] * 4, logprobs=np.zeros(4))
    batch = learner.make_rows(config, [*short, long])
    assert batch.tokens.shape == expected
    assert batch.lengths.sum() == 88


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"row_length": 64}, r"batching\.row_length: set without pack"),
        ({"tokens_per_device": 64}, r"batching\.tokens_per_device: set without pack"),
        ({"pack": True, "row_length": 64, "tokens_per_device": 63}, r"batching\.tokens_per_device: got 63, .*\(64\)"),
        ({"pack": True, "row_length": 12}, r"batching\.row_length: got 12, .* \(13\)"),
        ({"pack": True, "tokens_per_device": 12}, r"batching\.tokens_per_device: got 12, .* \(13\)"),
    ],
)
def test_packing_that_is_refused(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict({"max_prompt_length": 9, "max_completion_length": 4, "batching": values})


def test_mask_truncated_completions():
    completions = [
        Completion(token_ids=[1, 2], logprobs=np.zeros(2), sampled_logprobs=None, finish_reason=reason)
        for reason in ("stop", "length")
    ]
    scores = SimpleNamespace(total=np.ones(2))
    prompt = Prompt(0, "1+1=", "1+1=", [0], {})
    rollout = RolloutBatch(prompts=[prompt], completions=completions, texts=["", ""], scores=scores, group=2)
    for mask_truncated_completions, trained in ((False, [True, True]), (True, [True, False])):
        samples = make_samples(rollout, mask_truncated_completions, dropped=np.array([False]))
        assert [s.trained for s in samples] == trained


def supervised(folder, monkeypatch, **values):
    """A supervised stage that computes nothing: its looks at accuracy, and its batch sizes."""
    looks, rows, original = [], set(), warm_start.make_batch

    def make_batch(samples, *arguments, **options):
        rows.add(len(samples) - 1)  # One more rides along for its length.
        return original(samples, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "make_batch", make_batch)
        patch.setattr(warm_start, "_make_step", lambda *_: lambda state, batch: (state, 0.0))
        patch.setattr(warm_start.SupervisedStage, "_look", lambda _, p, step, metrics: looks.append(step) or step / 10)
        config = tiny_config(folder, warm_start=WarmStartConfig(**values))
        trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
        warm_start.SupervisedStage(trainer, None, None, lambda: None).run()
    return looks, rows


def test_warm_start_length(tmp_path, monkeypatch):
    """``max_steps``, ``eval_steps``, ``target_accuracy`` and ``batch_size`` of the supervised stage."""
    assert supervised(tmp_path, monkeypatch, max_steps=7, eval_steps=3, batch_size=4) == ([0, 3, 6, 7], {4})
    assert supervised(tmp_path, monkeypatch, max_steps=7, eval_steps=3, target_accuracy=0.6) == ([0, 3, 6], {len(ROWS)})


def test_warm_start_learning_rate(tmp_path, monkeypatch):
    """``learning_rate``: Adam's first direction is the gradient's sign."""
    monkeypatch.setattr(warm_start.SupervisedStage, "_look", lambda *_: 0.0)
    config = tiny_config(tmp_path, warm_start=WarmStartConfig(max_steps=1, learning_rate=0.03))
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    before = jax.tree.map(jnp.copy, trainer.learner.state.params)
    warm_start.SupervisedStage(trainer, None, None, lambda: None).run()
    after = trainer.learner.state.params
    changes = [jnp.max(jnp.abs(a - b)) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before))]
    np.testing.assert_allclose(max(changes), 0.03, rtol=1e-3)


def test_warm_start_answer_column(tmp_path):
    settings = WarmStartConfig(max_steps=1, answer_column="sum")
    trainer = RLTrainer(
        config=tiny_config(tmp_path / "run", warm_start=settings), reward_funcs=digits, train_dataset=ROWS
    )
    with pytest.raises(
        ConfigError, match=r"warm_start\.answer_column: the data has no column 'sum', takes one of answer"
    ):
        trainer.train()


SAMPLING = {  # Field -> a value, and where it goes in training's and in evaluation's sampling.
    "temperature": (0.7, "temperature", None),
    "top_p": (0.8, "top_p", None),
    "top_k": (5, "top_k", None),
    "min_p": (0.1, "min_p", None),
    "max_completion_length": (7, "max_tokens", "max_tokens"),
    "seed": (9, "seed", "seed"),
    "rollout.min_tokens": (2, "min_tokens", "min_tokens"),
    "rollout.stop": (("x",), "stop", "stop"),
    "rollout.stop_token_ids": ((3,), "stop_token_ids", "stop_token_ids"),
    "rollout.first_token_temperature": (1.5, "first_token_temperature", None),
    "evaluation.temperature": (0.6, None, "temperature"),
    "evaluation.top_p": (0.5, None, "top_p"),
}


@pytest.mark.parametrize("path", SAMPLING)
def test_sampling(path):
    """Each field changes one thing; what sampling does with it is shown in the engine's tests."""
    value, trained, evaluated = SAMPLING[path]
    section, _, name = path.rpartition(".")
    data = {section: {name: value}} if section else {name: value}
    for make, where in ((training_sampling, trained), (evaluation_sampling, evaluated)):
        before, after = dataclasses.asdict(make(RLConfig())), dataclasses.asdict(make(from_dict(data)))
        if path == "seed":  # Evaluation's is another than training's, and follows it.
            value = 9 + make(RLConfig(seed=0)).seed
        assert {key: after[key] for key in after if after[key] != before[key]} == ({where: value} if where else {})
