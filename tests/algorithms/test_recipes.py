"""Recipes are data: every field counts, unknown names are refused, and documentation that runs."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from jaxrft import algorithms as alg

# Field -> another value of it, and what must be set besides for the field to matter.
CHANGES = {
    "baseline": ("leave_one_out", {}),
    "scale": ("batch_std", {}),
    "level": ("sequence", {}),
    "clip_low": (0.05, {}),
    "clip_high": (0.07, {}),
    "dual_clip": (1.1, {}),
    "reduction": ("sequence_sum", {}),
    "constant_length": (9, {"reduction": "constant"}),
    "kl_coef": (0.3, {}),
    "kl_kind": ("k2", {"kl_coef": 0.3}),
}
FIELDS = {f.name for part in (alg.AdvantageEstimator, alg.PolicyObjective) for f in dataclasses.fields(part)}


def loss_of(recipe):
    """Of a fixed batch: rewards, advantages, loss."""
    rng = np.random.default_rng(0)
    logprobs, noise, reference = rng.normal(size=(3, 6, 5)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 3, 2, 4, 1, 5])[:, None]
    rewards, groups = rng.normal(size=6), np.array([0, 0, 0, 1, 1, 1])
    advantages = alg.group_advantages(rewards, groups, 2, recipe.advantage.baseline, recipe.advantage.scale)
    return float(
        alg.policy_loss(recipe.policy, logprobs, logprobs + noise, advantages, mask, ref_logprobs=reference)[0]
    )


@pytest.mark.parametrize("name", alg.recipes())
def test_each_override_changes_the_loss(name):
    assert set(CHANGES) == FIELDS - {"objective"}, "the objective has one value"
    recipe = alg.recipe(name).with_overrides({"constant_length": 16})
    for field, (value, besides) in CHANGES.items():
        base = recipe.with_overrides(besides)
        changed = base.with_overrides({field: value})
        assert abs(loss_of(changed) - loss_of(base)) > 1e-4, field
        assert changed == recipe.with_overrides({**besides, field: value})


def test_recipes_are_what_their_papers_say():
    grpo, dr_grpo, dapo = map(alg.recipe, ("grpo", "dr_grpo", "dapo"))
    assert (grpo.advantage.scale, grpo.policy.reduction, grpo.policy.clip_high) == ("std", "sequence_mean", None)
    assert (dr_grpo.advantage.scale, dr_grpo.policy.reduction) == ("none", "constant")
    assert (dapo.policy.clip_low, dapo.policy.clip_high, dapo.policy.reduction) == (0.2, 0.28, "token_mean")
    for recipe in (grpo, dr_grpo, dapo):
        assert recipe.advantage.baseline == "mean"
        assert recipe.policy.kl_coef == 0
        assert {recipe: 1}[recipe] == 1, "recipes are hashable"


def test_overrides_leave_the_recipe_as_it_was():
    before = alg.recipe("grpo")
    changed = before.with_overrides({"scale": "none", "clip_high": 0.5})
    assert (changed.advantage.scale, changed.policy.clip_high) == ("none", 0.5)
    assert (before.advantage.scale, before.policy.clip_high) == ("std", None)
    assert before.with_overrides({}) == before == alg.recipe("grpo")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alg.recipe("gropo"), "recipe: got 'gropo', takes dapo, dr_grpo or grpo; did you mean grpo?"),
        (lambda: alg.recipe("dapoo"), "did you mean dapo?"),
        (
            lambda: alg.recipe("grpo").with_overrides({"clip_hihg": 0.3}),
            "recipe field: got 'clip_hihg'.*did you mean clip_high?",
        ),
        (lambda: alg.recipe("grpo").with_overrides({"reduction": "token"}), "reduction: got 'token'"),
        (lambda: alg.recipe("grpo").with_overrides({"scale": "st"}), "scale: got 'st'.*did you mean std?"),
        (lambda: alg.AdvantageEstimator(baseline="means"), "baseline: got 'means'.*did you mean mean?"),
    ],
)
def test_unknown_names_give_the_nearest(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


def test_the_page_in_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "add-an-algorithm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
