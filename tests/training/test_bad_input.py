"""Bad input ends with one line that says what to do, before anything is lost."""

import json

import pytest

from jaxrft import RLTrainer
from jaxrft.config import ConfigError, DataConfig, ModelConfig, ParallelConfig, RewardsConfig, RLConfig, WarmStartConfig
from jaxrft.rewards import RewardError
from tests.training.tiny import MODEL, ROWS, SCRATCH, digits, tiny_config


def refuse(message, config, **parts):
    given = {"reward_funcs": digits, "train_dataset": ROWS} | parts
    with pytest.raises(ConfigError, match=message) as caught:
        RLTrainer(config=config, **given).train()
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_model_folder(tmp_path):
    config = tiny_config(tmp_path / "run", model=ModelConfig(path=str(tmp_path / "nothing"), tokenizer=MODEL.tokenizer))
    refuse("model.path: .*nothing", config)
    assert not (tmp_path / "run").exists()


def test_no_model_at_all(tmp_path):
    refuse("model.*got None", tiny_config(tmp_path / "run", model=ModelConfig()))


def test_unknown_family(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    model = ModelConfig(path=str(tmp_path / "model"), tokenizer=MODEL.tokenizer)
    refuse("gpt2.*qwen2", tiny_config(tmp_path / "run", model=model))
    scratch = ModelConfig(scratch=SCRATCH | {"model_type": "gpt2"}, tokenizer=MODEL.tokenizer)
    refuse("gpt2.*qwen2", tiny_config(tmp_path / "run", model=scratch))


def test_tokenizer_without_a_chat_template(tmp_path):
    from jaxrft.data import load_tokenizer

    tokenizer = load_tokenizer(MODEL.tokenizer)
    tokenizer.chat_template = None
    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    refuse("data.chat_template", tiny_config(tmp_path / "run"), train_dataset=chat, tokenizer=tokenizer)


def test_dataset_without_the_column(tmp_path):
    rows = [{"question": row["prompt"]} for row in ROWS]
    refuse("question.*data.columns", tiny_config(tmp_path / "run"), train_dataset=rows)


def test_reward_needs_a_column(tmp_path):
    config = tiny_config(tmp_path / "run", rewards=RewardsConfig(functions=["exact_match"]))
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    refuse("exact_match.*answer", config, train_dataset=rows, reward_funcs=None)


def test_warm_start_without_answers(tmp_path):
    config = tiny_config(tmp_path / "run", warm_start=WarmStartConfig(max_steps=5))
    refuse("warm_start.answer_column", config, train_dataset=[{"prompt": row["prompt"]} for row in ROWS])
    config = tiny_config(tmp_path / "other", warm_start=WarmStartConfig(max_steps=5))
    refuse("warm_start.answer_column", config, eval_dataset=[{"prompt": row["prompt"]} for row in ROWS])


@pytest.mark.parametrize("rows", [[], "empty.jsonl"])
def test_empty_dataset(tmp_path, rows):
    if rows == "empty.jsonl":
        rows = str(tmp_path / rows)
        open(rows, "w").close()
    refuse("dataset is empty", tiny_config(tmp_path / "run"), train_dataset=rows)


def test_missing_file(tmp_path):
    config = tiny_config(tmp_path / "run", data=DataConfig(train=str(tmp_path / "sums.jsonl")))
    refuse("no file or folder.*sums.jsonl", config, train_dataset=None)


def test_no_dataset_and_no_rewards(tmp_path):
    refuse("data.train.*got None", tiny_config(tmp_path / "run"), train_dataset=None)
    refuse("rewards.functions", tiny_config(tmp_path / "run"), reward_funcs=None)


def test_reward_returns_the_wrong_count(tmp_path):
    with pytest.raises(RewardError, match=r"short.*8.*7|short.*7.*8"):
        RLTrainer(config=tiny_config(tmp_path / "run"), reward_funcs=short, train_dataset=ROWS).train()


def short(completions, **_):
    return [0.0] * (len(completions) - 1)


def test_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match="num_generations.*does not divide"):
        RLConfig(per_device_train_batch_size=6, num_generations=4)
    with pytest.raises(ConfigError, match="multiple of gradient_accumulation_steps"):
        RLConfig(gradient_accumulation_steps=2, steps_per_generation=3)
    with pytest.raises(ConfigError, match="generation_batch_size.*multiple"):
        RLConfig(per_device_train_batch_size=8, generation_batch_size=12)


def test_more_devices_than_there_are(tmp_path):
    config = tiny_config(
        tmp_path / "run", parallel=ParallelConfig(replica=64), per_device_train_batch_size=1, num_generations=64
    )
    refuse("parallel.replica.*device", config)


def test_unknown_recipe(tmp_path):
    from jaxrft.config import AlgorithmConfig

    refuse("algorithm.recipe.*grpo", tiny_config(tmp_path / "run", algorithm=AlgorithmConfig(recipe="grpp")))


def test_evaluation_without_prompts(tmp_path):
    trainer = RLTrainer(config=tiny_config(tmp_path / "run"), reward_funcs=digits, train_dataset=ROWS)
    with pytest.raises(ConfigError, match="data.eval"):
        trainer.evaluate()


def test_a_module_needs_a_tokenizer(tmp_path):
    from jaxrft import models

    module = models.from_config(SCRATCH | {"vocab_size": 20})
    refuse("tokenizer", tiny_config(tmp_path / "run", model=ModelConfig()), model=module)


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
    model = ModelConfig(scratch=SCRATCH | {"vocab_size": 5}, tokenizer=MODEL.tokenizer)
    refuse("vocab", tiny_config(tmp_path / "run", model=model))


def test_longer_than_the_model_is_made_for(tmp_path):
    refuse(
        "max_completion_length.*8 tokens.*of 25.*32 that the model",
        tiny_config(tmp_path / "run", max_completion_length=25),
    )


def test_full_disk_at_a_checkpoint(tmp_path, run_python):
    code = f"""
import resource
from tests.training.tiny import ROWS, digits, tiny_config
from jaxrft import RLTrainer
from jaxrft.config import ConfigError

calls = 0
def full(completions, **_):
    global calls
    calls += 1
    if calls == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    return digits(completions)
try:
    config = tiny_config({str(tmp_path / "run")!r}, save_steps=1, log_completions=False)
    RLTrainer(config=config, reward_funcs=full, train_dataset=ROWS).train()
except ConfigError as error:
    print("refused:", error)
"""
    said = run_python(code).stdout
    assert "refused: no room to write" in said
    assert "resume_from_checkpoint=true" in said
    resumed = RLTrainer(
        config=tiny_config(tmp_path / "run", save_steps=1, resume_from_checkpoint=True),
        reward_funcs=digits,
        train_dataset=ROWS,
    )
    resumed.train()
    assert resumed.learner.step == 4


def test_command_line_prints_one_line(tmp_path, run_python):
    """The same through ``python -m jaxrft.train``: exit code 2, no traceback, nothing on standard output."""
    for override, word in [("model.path=/nowhere/model", "/nowhere/model"), ("learning_rat=1", "learning_rate")]:
        arguments = ["configs/quickstart.yaml", override, "model.scratch=null", f"output_dir={tmp_path}/x"]
        code = f"import sys; from jaxrft.train import main; sys.exit(main({arguments!r}))"
        done = run_python(code, check=False)
        assert done.returncode == 2
        assert word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "x").exists()
