"""What the config's fields become: schedules, batch arithmetic, sampling, recipes, prompts, models."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from jaxrft import RLTrainer
from jaxrft.config import (
    AlgorithmConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
)
from jaxrft.data.records import Prompt
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion
from jaxrft.training import parts
from jaxrft.training.optimizer import schedule
from jaxrft.training.rollouts import (
    RolloutBatch,
    evaluation_sampling,
    make_samples,
    shuffled,
    training_sampling,
)
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config


@pytest.mark.parametrize(
    ("kind", "warmup"),
    [
        ("linear", {"warmup_steps": 3}),
        ("cosine", {"warmup_ratio": 0.2}),
        ("constant", {}),
        ("constant_with_warmup", {"warmup_steps": 4}),
    ],
)
def test_schedules_are_those_of_transformers(kind, warmup):
    total, rate = 17, 3e-4
    config = RLConfig(learning_rate=rate, lr_scheduler_type=kind, **warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    steps = warmup.get("warmup_steps", -(-total * warmup.get("warmup_ratio", 0) // 1))
    theirs = transformers.get_scheduler(kind, optimizer, int(steps), total)
    ours = schedule(config, total)
    for step in range(total):
        np.testing.assert_allclose(float(ours(step)), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-10)
        optimizer.step()
        theirs.step()


def test_batch_arithmetic():
    config = RLConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=6,
        num_generations=8,
        num_iterations=3,
    )
    assert (config.rollout_samples, config.rollout_prompts, config.micro_batches) == (24, 3, 6)
    assert config.updates_per_rollout == 9
    same = RLConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        generation_batch_size=24,
        num_generations=8,
        num_iterations=3,
    )
    assert (same.rollout_samples, same.updates_per_rollout) == (24, 9)


def test_length_of_a_run(tmp_path):
    """20 prompts at 2 a rollout: 10 rollouts an epoch."""

    def steps(**changes):
        config = tiny_config(tmp_path, **{"max_steps": -1} | changes)
        return RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS).total_steps

    assert steps() == 10
    assert steps(num_train_epochs=1.5) == 15
    assert steps(num_train_epochs=2, num_iterations=2) == 40
    assert steps(max_steps=7, num_train_epochs=2) == 7
    assert steps(num_train_epochs=0.7) == 7, "0.7 * 10 is more than 7 in binary fractions"


def test_order_of_the_data(tmp_path):
    def first(**changes):
        config = tiny_config(tmp_path, **changes)
        trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
        return [i for r in range(10) for i in trainer.order.indices(r)]

    assert first(shuffle_dataset=False) == list(range(20))
    assert first() == first()
    assert first() != first(seed=4)
    assert sorted(first()) == list(range(20))


def test_sampling_parameters():
    rollout = RolloutConfig(min_tokens=2, stop=["."], stop_token_ids=[5], first_token_temperature=9.0)
    config = RLConfig(
        seed=7, temperature=0.8, top_p=0.9, top_k=11, min_p=0.05, max_completion_length=33, rollout=rollout
    )
    got = training_sampling(config)
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.max_tokens, got.seed) == (0.8, 0.9, 11, 0.05, 33, 7)
    assert (got.min_tokens, got.stop, got.stop_token_ids, got.first_token_temperature) == (2, (".",), (5,), 9.0)
    greedy = evaluation_sampling(config)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0.0, 1.0, 0, 0.0)
    assert greedy.first_token_temperature is None
    assert greedy.stop == (".",)
    drawn = evaluation_sampling(RLConfig(evaluation=EvaluationConfig(temperature=0.5, top_p=0.7)))
    assert (drawn.temperature, drawn.top_p) == (0.5, 0.7)


@pytest.mark.parametrize(
    ("name", "value", "nested", "expected"),
    [
        ("epsilon", 0.1, "clip_low", 0.1),
        ("epsilon_high", 0.3, "clip_high", 0.3),
        ("beta", 0.04, "kl_coef", 0.04),
        ("loss_type", "dapo", "reduction", "token_mean"),
        ("scale_rewards", "none", "scale", "none"),
        ("importance_sampling_level", "sequence", "level", "sequence"),
        ("delta", 1.5, "ratio_cap", 1.5),
        ("top_entropy_quantile", 0.2, "entropy_share", 0.2),
        ("use_bias_correction_kl", True, "kl_weighted", True),
        ("off_policy_mask_threshold", 0.5, "sequence_mask", 0.5),
        ("multi_objective_aggregation", "normalize_then_sum", "aggregation", "normalize_then_sum"),
        ("sapo_temperature_pos", 2.0, "sapo_positive", 2.0),
        ("sapo_temperature_neg", 3.0, "sapo_negative", 3.0),
    ],
)
def test_top_level_fields_of_the_recipe(name, value, nested, expected):
    besides = {"recipe": "sapo"} if name.startswith("sapo") else {"kl_coef": 0.1} if nested == "kl_weighted" else {}

    def found(settings=None, **fields):
        made = parts.build_recipe(RLConfig(algorithm=AlgorithmConfig(**besides | (settings or {})), **fields))
        (part,) = (p for f in dataclasses.fields(made) if hasattr(p := getattr(made, f.name), nested))
        return getattr(part, nested)

    assert found() != expected
    assert found(**{name: value}) == expected
    assert found({nested: expected}) == expected
    with pytest.raises(ConfigError, match=f"{name}: set with algorithm.{nested}"):
        RLConfig(**{name: value}, algorithm=AlgorithmConfig(**{nested: expected}))


def test_other_fields_of_the_recipe():
    changes = {"dual_clip": 3.0, "kl_coef": 0.1, "kl_kind": "k1", "baseline": "leave_one_out"}
    recipe = parts.build_recipe(
        RLConfig(algorithm=AlgorithmConfig(recipe="dr_grpo", **changes), max_completion_length=77)
    )
    assert (recipe.policy.dual_clip, recipe.policy.kl_kind) == (3.0, "k1")
    assert (recipe.advantage.baseline, recipe.advantage.scale) == ("leave_one_out", "none")
    assert (recipe.policy.reduction, recipe.policy.constant_length) == ("constant", 77)


def rollout_of(rewards, finish):
    rewards = np.array(rewards, np.float32)
    completions = [
        Completion(token_ids=[1, 2], logprobs=np.zeros(2), sampled_logprobs=None, finish_reason=f) for f in finish
    ]
    return RolloutBatch(
        prompts=[Prompt(0, "a", "a", [3]), Prompt(1, "b", "b", [4])],
        completions=completions,
        texts=["x"] * 4,
        scores=Scores(total=rewards, components={"r": rewards}),
        group=2,
    )


def test_samples_left_out_of_the_loss():
    rollout = rollout_of([1.0, 0.0, np.nan, 0.5], ["stop", "length", "stop", "stop"])
    none, second = np.array([False, False]), np.array([False, True])
    samples = make_samples(rollout, False, none)
    assert [s.trained for s in samples] == [True, True, False, True]
    assert [s.trained for s in make_samples(rollout, True, none)] == [True, False, False, True]
    assert [s.trained for s in make_samples(rollout, False, second)] == [True, True, False, False]
    assert [s.prompt_ids for s in samples] == [[3], [3], [4], [4]]
    assert [s.group for s in samples] == [0, 0, 1, 1]


def test_the_order_of_samples():
    order = shuffled(50, seed=1, rollout=2)
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    assert order == shuffled(50, seed=1, rollout=2)
    assert order != shuffled(50, seed=1, rollout=3)
    blocks = np.array(shuffled(48, seed=1, rollout=2, block=4)).reshape(-1, 4)
    assert (blocks == blocks[:, :1] + np.arange(4)).all(), "those of a block stay together, in order"
    assert sorted(blocks[:, 0]) == list(range(0, 48, 4))
    assert list(blocks[:, 0]) != sorted(blocks[:, 0])


def test_prompts_by_config(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"q": row["prompt"], "answer": row["answer"]}) for row in ROWS))
    settings = DataConfig(train=str(path), columns={"prompt": "q"}, max_train_samples=6)
    tokenizer = parts.build_tokenizer(RLConfig(model=MODEL), None, None)
    train = parts.build_prompts(RLConfig(data=settings), None, tokenizer, "train").prompts
    assert [p.text for p in train] == [row["prompt"] for row in ROWS[:6]]
    assert [p.columns for p in train] == [{"answer": row["answer"]} for row in ROWS[:6]]
    settings = DataConfig(eval="jaxrft.data.synthetic:addition_test", arguments={"digits": 1}, max_eval_samples=3)
    held_out = parts.build_prompts(RLConfig(data=settings), None, tokenizer, "eval").prompts
    assert len(held_out) == 3
    assert all(len(p.text) == 4 for p in held_out)
    assert parts.build_prompts(RLConfig(data=settings), None, tokenizer, "train") is None


def test_long_prompts_are_dropped_or_refused():
    rows = [*ROWS, {"prompt": "1234567890+1=", "answer": "x"}]
    tokenizer = parts.build_tokenizer(RLConfig(model=MODEL), None, None)
    config = RLConfig(model=MODEL, max_prompt_length=4)
    found = parts.build_prompts(config, rows, tokenizer, "train")
    assert (len(found.prompts), found.dropped) == (20, 1)
    strict = RLConfig(model=MODEL, max_prompt_length=4, data=DataConfig(overlong_prompts="error"))
    with pytest.raises(ConfigError, match="max_prompt_length"):
        parts.build_prompts(strict, rows, tokenizer, "train")


def test_splits_system_prompt_and_template(tmp_path):
    import datasets

    rows = {split: [{"prompt": [{"role": "user", "content": split[-1]}]}] for split in ("part1", "part2")}
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})
    made.save_to_disk(tmp_path / "saved")
    settings = DataConfig(
        train=str(tmp_path / "saved"),
        train_split="part1",
        eval=str(tmp_path / "saved"),
        eval_split="part2",
        system_prompt="9",
        chat_template="{% for m in messages %}{{ m['content'] }}+{% endfor %}",
    )
    config = RLConfig(model=MODEL, data=settings)
    tokenizer = parts.build_tokenizer(config, None, None)
    assert [p.text for p in parts.build_prompts(config, None, tokenizer, "train").prompts] == ["9+1+"]
    assert [p.text for p in parts.build_prompts(config, None, tokenizer, "eval").prompts] == ["9+2+"]


def test_models_by_config(tmp_path):
    lengths = {"max_prompt_length": 8, "max_completion_length": 8}
    config = RLConfig(model=MODEL, seed=5, **lengths)
    tokenizer = parts.build_tokenizer(config, None, None)
    model = parts.build_model(config, None, tokenizer, None, "none")
    assert model.spec.vocab_size == len(tokenizer)
    assert (model.spec.hidden_size, model.spec.num_layers) == (16, 1)
    other = parts.build_model(RLConfig(model=MODEL, seed=6, **lengths), None, tokenizer, None, "none")
    assert not np.array_equal(model.embed.embedding[...], other.embed.embedding[...])
    half = ModelConfig(scratch=SCRATCH, tokenizer=MODEL.tokenizer, dtype="bfloat16")
    lowered = parts.build_model(RLConfig(model=half, **lengths), None, tokenizer, None, "none")
    assert lowered.hidden(np.zeros((1, 3), np.int32)).dtype == "bfloat16"
    assert lowered.embed.embedding[...].dtype == "float32"


def test_rewards_by_config():
    settings = RewardsConfig(
        functions=["format_boxed", "exact_match"],
        arguments={"exact_match": {"extract": r"\d"}},
        on_error="none",
        timeout=2.0,
    )
    rewards = parts.build_rewards(RLConfig(rewards=settings, reward_weights=[0.5, 2.0]), None)
    assert rewards.names == ["format_boxed", "exact_match"]
    assert rewards.weights == [0.5, 2.0]
    with pytest.raises(ConfigError, match="reward_weights: got 1 weights for 2"):
        parts.build_rewards(RLConfig(reward_weights=[1.0]), [digits, digits])


def test_engine_by_config(tmp_path):
    config = RLConfig(
        model=MODEL,
        max_prompt_length=8,
        max_completion_length=4,
        rollout=RolloutConfig(engine="native", max_slots=3, decode_chunk=2),
    )
    tokenizer = parts.build_tokenizer(config, None, None)
    engine = parts.build_engine(config, parts.build_model(config, None, tokenizer, None, "none"), tokenizer, tmp_path)
    assert (engine._max_slots, engine._steps, engine._max_length) == (3, 2, 12)
