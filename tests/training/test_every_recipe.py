"""Every recipe, and every objective and option that no recipe has, from the config to trained parameters."""

import ast
import math
import re

import jax
import numpy as np
import pytest

from jaxrft import RLTrainer
from jaxrft import algorithms as alg
from jaxrft.config import AlgorithmConfig, ConfigError, ParallelConfig, RolloutConfig
from jaxrft.tracking import read_completions, read_metrics
from jaxrft.training import rollouts
from jaxrft.training.collector import Collector
from jaxrft.training.learner import Learner
from jaxrft.training.rollouts import training_sampling
from tests.training.learners import difference, host
from tests.training.tiny import ROWS, digits, tiny_config


def short(completions, **_):
    return [1.0 - len(text) / 4 for text in completions]


def train(folder, rewards=digits, **changes):
    """A run of two rollouts: the trainer, and the records of its steps."""
    config = tiny_config(folder / "run", **{"max_steps": 2} | changes)
    trainer = RLTrainer(config=config, reward_funcs=rewards, train_dataset=ROWS)
    before = [np.array(leaf) for leaf in jax.tree.leaves(trainer.learner.state.params)]
    trainer.train()
    records = [record for record in read_metrics(trainer.folder.metrics) if "reward" in record]
    assert [record["step"] for record in records] == list(range(1, trainer.learner.step + 1))
    for record in records:
        odd = {name: value for name, value in record.items() if value is None or not math.isfinite(value)}
        assert not odd, "every number of a run is finite"
        assert record["skipped_steps"] == 0
        assert record["grad_norm"] > 0
    assert records[0]["ratio/mean"] == pytest.approx(1, abs=1e-5)
    after = jax.tree.leaves(trainer.learner.state.params)
    assert all(np.isfinite(leaf).all() for leaf in after)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(after, before))
    return trainer, records


REPORTS = {  # What a recipe reports besides what all do.
    "cispo": "clip_ratio/high_mean",
    "clip_cov": "covariance/chosen_mean",
    "cpgd": "drift_mean",
    "dapo": "filter/kept_ratio",
    "gmpo": "clip_ratio/region_mean",
    "gspo": "clip_ratio/region_mean",
    "kl_cov": "covariance/chosen_mean",
    "remax": "greedy_reward",
    "sapo": "sapo/slope_mean",
    "tis_grpo": "correction/weight_mean",
}


@pytest.mark.parametrize("name", [name for name in alg.recipes() if name != "ppo"])
def test_every_recipe_trains(tmp_path, name):
    _, records = train(tmp_path, algorithm=AlgorithmConfig(recipe=name))
    own = set(REPORTS.values())
    for record in records:
        assert REPORTS.get(name, "loss") in record
        assert {"kl", "kl_coef"} & set(record) == set(), "no reference, no KL"
        if name not in REPORTS:
            assert own & set(record) <= {f"clip_ratio/{side}_mean" for side in ("high", "region")}


def test_ppo_is_refused_in_one_line(tmp_path):
    config = tiny_config(tmp_path / "run", algorithm=AlgorithmConfig(recipe="ppo"))
    with pytest.raises(ConfigError, match=r"^algorithm\.recipe: ppo needs a critic, which this version") as caught:
        RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


OPTIONS = {
    # Sampling that is not the policy's own: log-probabilities are without truncation, on both sides.
    "fire": {
        "temperature": 0.6,
        "top_p": 0.9,
        "rollout": RolloutConfig(first_token_temperature=5.0),
        "algorithm": AlgorithmConfig(objective="dppo_tv", correction="truncate", correction_level="sequence"),
    },
    "fire_masked": {
        "top_k": 5,
        "min_p": 0.01,
        "rollout": RolloutConfig(first_token_temperature=0.3, min_tokens=2),
        "algorithm": AlgorithmConfig(objective="dppo_kl", correction="mask", correction_level="geometric"),
        "off_policy_mask_threshold": 0.5,
    },
    "several_rewards": {
        "rewards": [digits, short],
        "reward_weights": [1.0, 0.3],
        "multi_objective_aggregation": "normalize_then_sum",
        "algorithm": AlgorithmConfig(objective="luspo", overlong_buffer=0.5, length_penalty=0.1),
    },
    "shaped": {
        "mask_truncated_completions": True,
        "algorithm": AlgorithmConfig(
            objective="vespo", running_norm="scale", reward_clip=3, difficulty_low=0.01, advantage_clip=2, gamma=0.9
        ),
    },
    "kl_in_reward": {
        "algorithm": AlgorithmConfig(
            recipe="reinforce_pp", kl_coef=0.1, kl_kind="k3+", kl_target=0.01, kl_horizon=20, entropy_share=0.5
        ),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "kl_weighted": {
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "delta": 1.5,
        "top_entropy_quantile": 0.5,
        "algorithm": AlgorithmConfig(entropy_scope="sequence", group_weight="informative", group_weight_cap=3),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 4,
    },
    "dro": {"algorithm": AlgorithmConfig(objective="dro", scale="mean"), "num_iterations": 2, "max_steps": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_all_kinds_train(tmp_path, name):
    _, records = train(tmp_path, **OPTIONS[name])
    for record in records:
        assert record["sampling/logprob_difference/max"] < 1e-4
        if name.startswith("fire"):
            assert record["correction/weight_mean"] == pytest.approx(1, abs=1e-3)
            assert record["correction/outside_mean"] == 0
    if name == "kl_in_reward":
        assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert 0 < records[1]["kl"] < 1
        assert records[0]["kl_coef"] == pytest.approx(0.1)
        assert records[1]["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 20)), "the KL was 0, below its target"


def test_gvpo_sees_whole_groups(tmp_path, monkeypatch):
    """Several updates of several micro-batches: the groups are mixed, their samples stay together."""
    seen, original = [], Learner.update

    def update(self, batch, *arguments):
        seen.append(np.asarray(batch.groups))
        yield from original(self, batch, *arguments)

    monkeypatch.setattr(Learner, "update", update)
    _, records = train(
        tmp_path,
        algorithm=AlgorithmConfig(objective="gvpo"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_steps=4,
    )
    assert all("gvpo/implied_reward_mean" in record for record in records)
    assert len(seen) == 2
    for groups in seen:
        assert groups.shape == (4, 8)
        of_groups = groups.reshape(-1, 4)
        assert (of_groups == of_groups[:, :1]).all()
        assert sorted(of_groups[:, 0]) == list(range(8)) != list(of_groups[:, 0])


# ------------------------------------------------------------------ ReMax


def partly(prompts, completions, **_):
    """Equal for two of three prompts."""
    return [value if (int(p[0]) + int(p[2])) % 3 == 0 else 0.5 for p, value in zip(prompts, digits(completions))]


def test_remax_subtracts_the_reward_of_a_greedy_completion(tmp_path, monkeypatch):
    """The most probable completion of each prompt that is trained on, however the others are drawn."""
    drawn, greedy, best, original = [[]], [], [], Collector.collect

    def collect(self, prompts, group, sampling, *arguments, **options):
        rollout = original(self, prompts, group, sampling, *arguments, **options)
        if group > 1:
            drawn[-1].append(rollout)
            return rollout
        greedy.append(rollout)
        drawn.append([])
        assert sampling == rollouts.greedy(training_sampling(config))
        # Now, while the module has the parameters that it was drawn from.
        for prompt, completion in zip(rollout.prompts, rollout.completions):
            logits = np.asarray(trainer.model(np.array([[*prompt.token_ids, *completion.token_ids]])))[0]
            best.append(logits[len(prompt.token_ids) - 1 : -1].argmax(-1).tolist() == list(completion.token_ids))
        return rollout

    monkeypatch.setattr(Collector, "collect", collect)
    algorithm = AlgorithmConfig(recipe="remax", dynamic_sampling=True)
    sampling = {"temperature": 0.9, "top_k": 9, "rollout": RolloutConfig(first_token_temperature=3.0)}
    config = tiny_config(tmp_path / "run", algorithm=algorithm, max_steps=2, **sampling)
    trainer = RLTrainer(config=config, reward_funcs=partly, train_dataset=ROWS)
    trainer.train()
    assert best == [True] * 4
    assert max(map(len, drawn)) > 1, "more had to be drawn"
    rows, records = read_completions(trainer.folder.path), read_metrics(trainer.folder.metrics)
    for all_drawn, baseline, record in zip(drawn, map(vars, greedy), records, strict=False):
        rollout = rollouts.join(all_drawn)
        rewards = rollout.scores.total.reshape(-1, 4)
        chosen = [i for i, group in enumerate(rewards) if np.ptp(group)][:2]
        assert baseline["prompts"] == [rollout.prompts[i] for i in chosen]
        subtracted = baseline["scores"].total
        assert record["greedy_reward"] == pytest.approx(subtracted.mean())
        expected = np.zeros_like(rewards)
        expected[chosen] = rewards[chosen] - subtracted[:, None]
        advantages = [row["advantage"] for row in rows if row["step"] == record["step"]]
        np.testing.assert_allclose(np.reshape(advantages, (-1, 4)), expected, atol=1e-6)


def test_greedy_sampling_leaves_out_all_that_is_random():
    config = tiny_config("run", top_k=3, top_p=0.5, min_p=0.1, rollout=RolloutConfig(first_token_temperature=9.0))
    drawn, most_probable = training_sampling(config), rollouts.greedy(training_sampling(config))
    changed = ("temperature", "top_p", "top_k", "min_p", "first_token_temperature")
    assert [getattr(most_probable, name) for name in changed] == [0.0, 1.0, 0, 0.0, None]
    same = [name for name in vars(drawn) if name not in changed]
    assert [getattr(most_probable, name) for name in same] == [getattr(drawn, name) for name in same]


# ------------------------------------------------------------------ on two devices

DEVICES = {
    "dapo": {"algorithm": AlgorithmConfig(recipe="dapo", running_norm="standardize")},
    "clip_cov": {"algorithm": AlgorithmConfig(recipe="clip_cov", cov_share=0.3, cov_low=-9, entropy_share=0.5)},
    "gvpo": {"algorithm": AlgorithmConfig(objective="gvpo", correction="truncate", correction_level="sequence")},
    "reinforce_pp": {"algorithm": AlgorithmConfig(recipe="reinforce_pp"), "beta": 0.1},
    "remax": {"algorithm": AlgorithmConfig(recipe="remax")},
}


def compare_devices(folder):
    """One rollout and its two updates on one device and on two: how far they are apart, relative to the change."""
    gaps = {}
    for name, changes in DEVICES.items():
        results = []
        for replica in (1, 2):
            config = tiny_config(
                folder / f"{name}_{replica}",
                max_steps=2,
                adam_epsilon=1.0,
                learning_rate=1.0,
                lr_scheduler_type="constant",
                per_device_train_batch_size=16 // replica,
                steps_per_generation=2,
                parallel=ParallelConfig(replica=replica),
                **changes,
            )
            trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
            start = host(trainer.learner.state.params)
            trainer.train()
            results.append(host(trainer.learner.state.params))
        gaps[name] = difference(*results, start)
    return gaps


@pytest.mark.soak
def test_two_devices_are_one(tmp_path, run_python):
    code = f"""
from pathlib import Path
from tests.training.test_every_recipe import compare_devices
print("gaps", compare_devices(Path({str(tmp_path)!r})))
"""
    done = run_python(code, devices=2)
    gaps = ast.literal_eval(re.search(r"^gaps (.*)$", done.stdout, re.MULTILINE)[1])
    assert set(gaps) == set(DEVICES)
    assert max(gaps.values()) < 1e-4, gaps
