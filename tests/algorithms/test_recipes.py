"""Recipes are data: they hold what their papers say, every field counts, and documentation that runs."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrft import algorithms as alg
from jaxrft.algorithms.objectives import SPECIFIC, SURROGATES
from jaxrft.algorithms.registry import RECIPES
from jaxrft.config import ConfigError
from jaxrft.config.parse import from_dict
from jaxrft.training import parts
from tests.algorithms import recipe_effects

# What each has that a recipe without settings has not: baseline mean, scale std, objective clip at the level of tokens
# with a clip of 0.2, reduction token_mean, no KL, no filter, no shaping.
PAPERS = {
    "grpo": {"reduction": "sequence_mean"},
    "dr_grpo": {"scale": "none", "reduction": "constant"},
    "dapo": {"dynamic_sampling": True, "overlong_buffer": 0.2, "clip_high": 0.28},
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence_mean"},
    "gmpo": {"level": "geometric", "clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence_mean"},
    "cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "objective": "reinforce", "reduction": "sequence_sum"},
    "reinforce": {"scale": "none", "group_weight": "informative", "objective": "reinforce"},
    "reinforce_pp": {"baseline": "none", "scale": "none", "whiten": True, "kl_kind": "k1", "kl_in_reward": True},
    "reinforce_pp_baseline": {"scale": "none", "whiten": True, "kl_kind": "k2"},
    "remax": {"baseline": "greedy", "scale": "none", "objective": "reinforce", "reduction": "sequence_sum"},
    "opo": {"baseline": "length", "scale": "none", "objective": "reinforce"},
    "cpgd": {"objective": "cpgd", "reduction": "sequence_mean"},
    "sapo": {"objective": "sapo", "reduction": "sequence_mean"},
    "ppo": {"estimator": "gae", "whiten": True},
    "clip_cov": {"objective": "clip_cov"},
    "kl_cov": {"objective": "kl_cov", "cov_share": 2e-3},
    "tis_grpo": {"reduction": "sequence_mean", "correction": "truncate"},
}
# The settings of objectives that are the defaults of their fields.
DEFAULTS = {
    "clip_low": 0.2,
    "drift_coef": 0.01,
    "sapo_positive": 1.0,
    "sapo_negative": 1.05,
    "cov_share": 2e-4,
    "cov_low": 1.0,
    "cov_high": 5.0,
    "cov_coef": 1.0,
    "correction_high": 2.0,
    "overlong_factor": 1.0,
    "kl_coef": 0.0,
}


def fields_of(recipe):
    """Field -> value, over all parts."""
    values = [getattr(recipe, part.name) for part in dataclasses.fields(recipe)]
    return {field.name: getattr(part, field.name) for part in values for field in dataclasses.fields(part)}


PLAIN = fields_of(alg.Recipe())


def test_recipes_are_what_their_papers_say():
    assert sorted(PAPERS) == alg.recipes()
    for name, settings in PAPERS.items():
        found = fields_of(alg.recipe(name))
        assert {field: value for field, value in found.items() if value != PLAIN[field]} == settings, name
    assert {field: PLAIN[field] for field in DEFAULTS} == DEFAULTS
    assert len({alg.recipe(name): name for name in PAPERS}) == len(PAPERS), "recipes are hashable, and all differ"


# ------------------------------------------------------------------ every field counts


def unread(recipe, field):
    """Whether a recipe has no use for a field, and refuses it."""
    critic = recipe.advantage.estimator == "gae"
    of_groups = ("baseline", "scale", "aggregation", "group_weight", "group_weight_cap")
    if field in SPECIFIC:
        return field not in recipe.policy.reads
    if field == "level":
        return len(SURROGATES[recipe.policy.objective].levels) == 1
    return field in (of_groups if critic else ("lam", "length_alpha"))


OTHER_OBJECTIVES = sorted(SURROGATES.keys() - {alg.recipe(name).policy.objective for name in alg.recipes()})


@pytest.mark.parametrize("name", [*alg.recipes(), *OTHER_OBJECTIVES])
def test_each_override_changes_what_it_must(name):
    """The first thing that changes is what the field is about; nothing before it does."""
    assert set(recipe_effects.CHANGES) == set(PLAIN)
    named = name in alg.recipes()
    recipe = alg.recipe(name) if named else alg.Recipe(policy=alg.PolicyObjective(objective=name))
    recipe = recipe.with_overrides({"constant_length": 16})
    for field, change in recipe_effects.CHANGES.items():
        if unread(recipe, field):
            continue
        base = recipe.with_overrides(change.needs)
        value = change.value(base, field)
        changed = base.with_overrides({field: value})
        assert recipe_effects.first_difference(base, changed) == change.stage(base), field
        assert changed == recipe.with_overrides({**change.needs, field: value})


@pytest.mark.parametrize("name", alg.recipes())
def test_each_objective_changes_the_loss_of_each_recipe(name):
    """Fields that it does not read go back to their defaults, with a level that it has not got the bounds too."""
    recipe = alg.recipe(name).with_overrides({"constant_length": 16})
    for objective, surrogate in SURROGATES.items():
        changed = recipe.with_overrides({"objective": objective})
        if objective == recipe.policy.objective:
            assert changed == recipe
            continue
        assert recipe_effects.first_difference(recipe, changed) == "loss", objective
        before = fields_of(recipe)
        has_level = before["level"] in surrogate.levels
        reset = {field for field in SPECIFIC if field not in surrogate.fields}
        reset |= set() if has_level else {"clip_low", "clip_high"}
        level = before["level"] if has_level else surrogate.levels[0]
        expected = before | {field: PLAIN[field] for field in reset} | {"level": level, "objective": objective}
        assert fields_of(changed) == expected


@pytest.mark.parametrize("objective", SURROGATES)
def test_a_field_that_an_objective_does_not_read_is_refused_by_its_name(objective):
    recipe = alg.Recipe(policy=alg.PolicyObjective(objective=objective))
    assert recipe.policy.reads == set(SURROGATES[objective].fields)
    for field in SPECIFIC:
        other = recipe_effects.CHANGES[field].values[0]
        if field in recipe.policy.reads:
            assert getattr(recipe.with_overrides({field: other}).policy, field) == other
        else:
            with pytest.raises(ValueError, match=rf"^{field}: got .*, which {objective} does not read; remove it$"):
                recipe.with_overrides({field: other})


def test_overrides_leave_the_recipe_as_it_was():
    before = alg.recipe("grpo")
    changed = before.with_overrides({"scale": "none", "clip_high": 0.5})
    assert (changed.advantage.scale, changed.policy.clip_high) == ("none", 0.5)
    assert (before.advantage.scale, before.policy.clip_high) == ("std", None)
    assert before.with_overrides({}) == before == alg.recipe("grpo")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alg.recipe("gropo"), "recipe: got 'gropo', takes .*grpo.*; did you mean grpo?"),
        (lambda: alg.recipe("dapoo"), "did you mean dapo?"),
        (
            lambda: alg.recipe("grpo").with_overrides({"clip_hihg": 0.3}),
            "recipe field: got 'clip_hihg'.*did you mean clip_high?",
        ),
        (lambda: alg.recipe("grpo").with_overrides({"reduction": "token"}), "reduction: got 'token'"),
        (lambda: alg.recipe("grpo").with_overrides({"scale": "st"}), "scale: got 'st'.*did you mean std?"),
        (lambda: alg.recipe("grpo").with_overrides({"objective": "cipso"}), "objective: got 'cipso'.*mean cispo?"),
        (lambda: alg.AdvantageEstimator(baseline="means"), "baseline: got 'means'.*did you mean mean?"),
        (lambda: alg.recipe("sapo").with_overrides({"level": "geometric"}), "level: got 'geometric', takes token"),
        (
            lambda: alg.recipe("gmpo").with_overrides({"dual_clip": 3.0}),
            "dual_clip: got 3.0, which the level geometric does not read",
        ),
        (
            lambda: alg.recipe("grpo").with_overrides({"aggregation": "normalize_then_sum", "reward_clip": 1.0}),
            "reward_clip: acts on the sum",
        ),
        (
            lambda: alg.recipe("reinforce_pp").with_overrides({"kl_coef": 0.1, "kl_weighted": True}),
            "kl_weighted: is of the KL in the loss",
        ),
        (lambda: alg.recipe("grpo").with_overrides({"kl_target": 0.1}), "kl_target: changes kl_coef, which is 0"),
        (lambda: alg.recipe("ppo").with_overrides({"scale": "none"}), "scale: got 'none', which gae does not read"),
        (lambda: alg.recipe("grpo").with_overrides({"lam": 0.9}), "lam: set without estimator: gae"),
        (lambda: alg.GroupFilter(difficulty_low=0.8, difficulty_high=0.2), "difficulty_low: got 0.8, takes at most"),
        (lambda: alg.RewardShaping(overlong_factor=2.0), "overlong_factor: set without overlong_buffer"),
        (lambda: alg.AdvantageEstimator(group_weight_cap=3.0), "group_weight_cap: set without group_weight"),
        (lambda: alg.GroupFilter(max_draws=3), "max_draws: set without dynamic_sampling"),
        (lambda: alg.KLControl(kl_horizon=3), "kl_horizon: set without kl_target"),
        (
            lambda: alg.recipe("grpo").with_overrides({"entropy_scope": "sequence"}),
            "entropy_scope: set without entropy_share",
        ),
        (
            lambda: alg.recipe("grpo").with_overrides({"correction_level": "geometric"}),
            "correction_level: set without correction",
        ),
        (lambda: alg.recipe("grpo").with_overrides({"correction_low": 0.5}), "correction_low: set without correction"),
        (
            lambda: alg.recipe("grpo").with_overrides({"correction_high": 5.0}),
            "correction_high: set without correction",
        ),
        (lambda: alg.recipe("grpo").with_overrides({"kl_weighted": True}), "kl_weighted: set without kl_coef"),
        (lambda: alg.recipe("grpo").with_overrides({"kl_kind": "k1"}), "kl_kind: set without kl_coef"),
        (
            lambda: alg.recipe("grpo").with_overrides({"kl_weighted": True, "kl_kind": "k3+", "kl_coef": 0.1}),
            "kl_kind: got 'k3\\+', takes one without a plus with kl_weighted",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_name(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


# ------------------------------------------------------------------ recipes of one's own


@pytest.fixture(autouse=True)
def _registries():
    """What a test registers is gone after it."""
    saved = [(known, dict(known)) for known in (RECIPES, SURROGATES)]
    yield
    for known, before in saved:
        known.clear()
        known.update(before)


def half(objective, x):
    return -0.5 * x.advantages * x.ratio * (1 + objective.clip_low), {}


def test_registered_recipes_and_objectives_have_names():
    mine = alg.recipe("gspo").with_overrides({"scale": "none"})
    alg.register_recipe("mine", alg.recipe("grpo"))
    alg.register_recipe("mine", mine)
    assert alg.recipe("mine") == mine, "the newest"
    assert "mine" in alg.recipes()
    with pytest.raises(ValueError, match="did you mean mine"):
        alg.recipe("mime")
    with pytest.raises(ValueError, match="^recipe: 'grpo' is taken"):
        alg.register_recipe("grpo", mine)
    with pytest.raises(ValueError, match="^objective: 'clip' is taken"):
        alg.register_objective("clip", alg.Surrogate(loss=half))
    alg.register_objective("half", alg.Surrogate(loss=half, levels=("token", "sequence"), fields=("clip_low",)))
    policy = alg.PolicyObjective(objective="half", clip_low=0.3, reduction="token_mean")
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    (value, stats), gradient = jax.value_and_grad(
        lambda x: alg.policy_loss(policy, x, zeros, ones, ones), has_aux=True
    )(zeros)
    assert value == pytest.approx(-0.65)
    np.testing.assert_allclose(gradient, -0.65 / 6 * ones, rtol=1e-6)
    assert stats["ratio/mean"] == 1
    for wrong in ({"clip_high": 0.3}, {"level": "geometric"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got"):
            alg.Recipe(policy=policy).with_overrides(wrong)


OWN = """
from jaxrft import algorithms as alg

def twice(objective, x):
    return -2 * x.advantages * x.logprobs, {"twice/advantage_mean": x.advantages}

alg.register_objective("twice_reinforce", alg.Surrogate(loss=twice))

def plain():
    return alg.Recipe(advantage=alg.AdvantageEstimator(baseline="leave_one_out"))

def mine():
    return alg.Recipe(policy=alg.PolicyObjective(objective="twice_reinforce", reduction="sequence_mean"))

def wrong():
    return alg.PolicyObjective()

def failing():
    return alg.Recipe(policy=alg.PolicyObjective(clip_low=-1.0))
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_a_recipe_of_a_users_file(own):
    """With the config's changes, and the objective that the file registers."""

    def built(**fields):
        return parts.build_recipe(from_dict({"algorithm": fields, "max_completion_length": 9}))

    assert built(recipe=f"{own}:plain") == alg.Recipe(
        advantage=alg.AdvantageEstimator(baseline="leave_one_out"), policy=alg.PolicyObjective(constant_length=9)
    )
    mine = built(recipe=f"{own}:mine", correction="truncate")
    assert (mine.policy.objective, mine.policy.correction) == ("twice_reinforce", "truncate")
    assert built(recipe=f"{own}:plain", objective="twice_reinforce").advantage.baseline == "leave_one_out"
    logprobs, ones = np.full((1, 2), -3, np.float32), np.ones((1, 2), np.float32)
    value, stats = alg.policy_loss(mine.policy, logprobs, logprobs, ones, ones, sampler_logprobs=logprobs)
    assert (value, stats["twice/advantage_mean"]) == (6, 1)
    Path(own).write_text(OWN.replace("-2 *", "-3 *"))
    changed = built(recipe=f"{own}:mine").policy
    assert alg.policy_loss(changed, logprobs, logprobs, ones, ones)[0] == 9, "as the file is now"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:wrong", "own.py:wrong returned PolicyObjective, takes a Recipe"),
        ("own.py:failing", "own.py:failing raised ValueError: clip_low: got -1.0, takes at least 0"),
        ("own.py:nothing", "own.py has no function 'nothing'"),
        ("other.py:mine", "no file .*other.py"),
        ("nowhere.recipes:mine", "no module 'nowhere'"),
        ("grppo", "got 'grppo', takes .*; did you mean grpo"),
    ],
)
def test_a_recipe_that_cannot_be_had_is_one_line(own, name, message):
    config = from_dict({"algorithm": {"recipe": name if name == "grppo" else own.replace("own.py", name)}})
    if name.startswith("nowhere"):
        config = from_dict({"algorithm": {"recipe": name}})
    with pytest.raises(ConfigError, match=rf"^algorithm\.recipe: .*{message}") as caught:
        parts.build_recipe(config)
    assert "\n" not in str(caught.value)


def test_the_page_in_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "add-an-algorithm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
