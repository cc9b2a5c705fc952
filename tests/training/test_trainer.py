"""The trainer as its users call it, and what a run leaves behind."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxrft import RLConfig, RLTrainer, models
from jaxrft.config import EvaluationConfig, ModelConfig, RewardsConfig, TrackingConfig, WarmStartConfig
from jaxrft.data import load_tokenizer
from jaxrft.tracking import read_completions, read_metrics
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config

REPORTED = [
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/digits/mean",
    "rewards/digits/std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "sampling/kl",
    "sampling/logprob_difference/mean",
    "sampling/logprob_difference/max",
    "ratio/mean",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "grad_norm",
    "skipped_steps",
    "learning_rate",
    "loss",
    "tokens_per_second/rollout",
    "tokens_per_second/training",
    "time/rollout",
    "time/rewards",
    "time/training",
    "compiles",
    "time/compile",
    "peak_memory_bytes",
    "epoch",
    "num_tokens",
]


def digit_model():
    return models.from_config(SCRATCH | {"vocab_size": 15, "eos_token_id": 1}, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps, two of each rollout, the last rollout cut short; a loop over everything that a run writes."""
    folder = tmp_path_factory.mktemp("run") / "first"
    config = tiny_config(
        folder,
        beta=0.02,
        max_steps=5,
        steps_per_generation=2,
        eval_steps=2,
        logging_steps=1,
        save_steps=2,
        save_total_limit=1,
        num_generations_eval=2,
        evaluation=EvaluationConfig(temperature=0.7),
        report_to=["tensorboard"],
        num_completions_to_print=1,
    )
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS[:16], eval_dataset=ROWS[16:])
    trainer.train()
    return trainer


def test_every_metric_is_reported_at_every_step(run):
    records = read_metrics(run.folder.metrics)
    steps = [r for r in records if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for record in steps:
        assert not set(REPORTED) - set(record), record
        assert all(np.isfinite(record[name]) for name in REPORTED)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 0
    assert steps[0]["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert steps[1]["ratio/mean"] != 1, "the second step of a rollout is off-policy"
    assert sum(r["compiles"] for r in steps[2:]) < 3, "later rollouts compile anew"


def test_evaluation_before_during_and_after(run):
    records = [r for r in read_metrics(run.folder.metrics) if "eval/reward" in r]
    assert [r["step"] for r in records] == [0, 2, 4, 5]


def test_the_folder_holds_the_run(run):
    folder = run.folder.path
    assert sorted(p.name for p in run.folder.checkpoints.iterdir()) == ["5"]
    assert (folder / "curve.png").stat().st_size > 10_000
    assert "num_generations: 4" in run.folder.config.read_text()
    rows = read_completions(folder)
    assert len(rows) == 3 * 16
    first = rows[0]
    assert {"prompt", "completion", "reward", "advantage", "finish_reason", "tokens"} <= set(first)
    assert first["reward"] == digits([first["completion"]])[0]
    assert {r["prompt"] for r in rows} <= {r["prompt"] for r in ROWS[:16]}


def test_the_final_model_is_the_policy(run):
    """transformers computes from the export what the trainer computes."""
    exported = transformers.AutoModelForCausalLM.from_pretrained(run.folder.final)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder.final)
    ids = tokenizer("3+4=7")["input_ids"]
    with torch.no_grad():
        theirs = exported(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(run.model(np.array([ids])), theirs, atol=1e-4)
    assert run.engine.version == run.learner.step == 5


def test_evaluation_covers_each_prompt_and_touches_nothing(run):
    before = [np.array(x) for x in jax.tree.leaves(run.learner.state)]
    seen = []

    def seeing(prompts, completions, **_):
        seen.extend(prompts)
        return digits(completions)

    counted = run.rewards._calls[0]
    original, counted.function = counted.function, seeing
    first = run.evaluate()
    counted.function = original
    assert sorted(seen) == sorted(2 * [r["prompt"] for r in ROWS[16:]])
    assert run.evaluate() == first, "declared sampling is repeatable"
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(run.learner.state)))


def test_ten_lines_of_python(tmp_path):
    """The same from Python, on a module; it holds the trained parameters at the end, even after an error."""
    model = digit_model()
    before = np.array(model.embed.embedding[...])
    config = RLConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        num_generations=4,
        learning_rate=1e-2,
        max_prompt_length=8,
        max_completion_length=3,
        tracking=TrackingConfig(progress=False),
    )
    trainer = RLTrainer(
        model=model, config=config, reward_funcs=[digits], train_dataset=ROWS, tokenizer=load_tokenizer(MODEL.tokenizer)
    )
    metrics = trainer.train()
    assert metrics["reward"] >= 0
    assert not np.array_equal(model.embed.embedding[...], before)
    trainer.save_model(tmp_path / "saved")
    loaded = RLTrainer(
        model=tmp_path / "saved",
        config=tiny_config(tmp_path / "again", model=ModelConfig(), max_steps=1),
        reward_funcs=digits,
        train_dataset=ROWS,
    )
    np.testing.assert_array_equal(loaded.model.embed.embedding[...], model.embed.embedding[...])


def test_a_reward_that_fails_leaves_the_module_usable(tmp_path):
    model = digit_model()
    calls = []

    def failing(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the reward broke")
        return digits(completions)

    config = tiny_config(tmp_path / "run", model=ModelConfig())
    tokenizer = load_tokenizer(MODEL.tokenizer)
    with pytest.raises(ValueError, match="failing.*the reward broke"):
        RLTrainer(model=model, config=config, reward_funcs=failing, train_dataset=ROWS, tokenizer=tokenizer).train()
    assert np.isfinite(np.asarray(model.embed.embedding[...])).all()


def test_failed_rewards_can_count_as_none(tmp_path):
    def picky(completions, **_):
        if len(completions) > 1 or completions[0].startswith("1"):
            raise RuntimeError("no")
        return digits(completions)

    config = tiny_config(tmp_path / "run", rewards=RewardsConfig(on_error="none"), max_steps=1)
    metrics = RLTrainer(config=config, reward_funcs=picky, train_dataset=ROWS).train()
    assert np.isfinite(metrics["grad_norm"])


def test_logging_steps_average(tmp_path):
    config = tiny_config(tmp_path / "run", logging_steps=3, max_steps=4, log_completions=False, eval_on_start=False)
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS, eval_dataset=ROWS[:1])
    trainer.train()
    records = read_metrics(trainer.folder.metrics)
    assert [r["step"] for r in records if "reward" in r] == [3, 4]
    assert [r["step"] for r in records if "eval/reward" in r] == [4]
    assert not (trainer.folder.path / "completions").exists() or not list(
        (trainer.folder.path / "completions").iterdir()
    )


def test_sampling_at_a_high_first_temperature_passes_the_audit(tmp_path):
    """FIRE's first token has its own temperature on both sides; truncation changes no log-probability."""
    from jaxrft.config import RolloutConfig

    config = tiny_config(
        tmp_path / "run",
        max_steps=1,
        temperature=0.6,
        top_k=5,
        top_p=0.9,
        rollout=RolloutConfig(first_token_temperature=5.0, min_tokens=2, stop=["="]),
    )
    metrics = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS).train()
    assert metrics["sampling/logprob_difference/max"] < 1e-4


def test_bfloat16_passes_the_audit(tmp_path):
    """In bfloat16 it is the mean that is held to a tolerance; parameters and moments stay float32."""
    model = ModelConfig(scratch=SCRATCH, tokenizer=MODEL.tokenizer, dtype="bfloat16")
    trainer = RLTrainer(
        config=tiny_config(tmp_path / "run", model=model, beta=0.02), reward_funcs=digits, train_dataset=ROWS
    )
    metrics = trainer.train()
    assert 0 < metrics["sampling/logprob_difference/mean"] < 5e-2
    floats = [x for x in jax.tree.leaves(trainer.learner.state) if np.issubdtype(x.dtype, np.inexact)]
    assert all(x.dtype == np.float32 for x in floats)


def test_warm_start_stops_at_its_target(tmp_path):
    settings = WarmStartConfig(
        max_steps=60, target_accuracy=0.2, eval_steps=5, batch_size=16, learning_rate=2e-2, answer_column="answer"
    )
    config = tiny_config(tmp_path / "run", warm_start=settings, max_steps=1)
    trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS, eval_dataset=ROWS[:10])
    trainer.train()
    records = [r for r in read_metrics(trainer.folder.metrics) if r.get("stage") == "warm_start"]
    reached = [r["eval/accuracy"] for r in records]
    assert records[0]["step"] == 0
    assert reached[-1] >= 0.2
    assert all(value < 0.2 for value in reached[:-1])
    assert all(r["step"] % 5 == 0 for r in records)


def test_columns_and_files_from_the_command_line(tmp_path, run_python):
    """A user's own JSONL file and reward file, through ``python -m jaxrft.train``."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": r["prompt"], "solution": r["answer"]}) for r in ROWS))
    (tmp_path / "reward.py").write_text(
        "def near(completions, solution, **_):\n"
        "    return [float(len(c) == len(s)) for c, s in zip(completions, solution)]\n"
    )
    arguments = [
        "configs/quickstart.yaml", f"output_dir={tmp_path}/run", f"data.train={rows}", "data.eval=null",
        "data.columns={prompt: question}", f"rewards.functions=[{tmp_path}/reward.py:near]", "warm_start.max_steps=0",
        "max_steps=1", "per_device_train_batch_size=8", "steps_per_generation=1", "gradient_accumulation_steps=1",
        "num_generations=4", "model.scratch.hidden_size=16", "model.scratch.intermediate_size=16",
    ]  # fmt: skip
    code = f"import sys; from jaxrft.train import main; sys.exit(main({arguments!r}))"
    done = run_python(code)
    assert "rewards/near" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Where everything is" in done.stdout
    again = run_python(code, check=False)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
