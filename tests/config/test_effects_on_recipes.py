"""What the fields of the algorithm change in the recipe that a run is made with."""

import dataclasses
import typing

import pytest

from jaxrft import algorithms as alg
from jaxrft.config import AlgorithmConfig, ConfigError, RLConfig
from jaxrft.config.parse import from_dict
from jaxrft.training import parts

CPGD, COVARIANCE, SAPO = {"recipe": "cpgd"}, {"recipe": "clip_cov"}, {"recipe": "sapo"}
VESPO, WEIGHTED, WITH_KL = {"objective": "vespo"}, {"group_weight": "informative"}, {"kl_coef": 0.01}
DYNAMIC, CORRECTED = {"dynamic_sampling": True}, {"correction": "mask"}

RECIPE = {  # Field -> a value, what it is in the recipe, and what must be set besides.
    "beta": (0.1, "policy.kl_coef", 0.1),
    "epsilon": (0.3, "policy.clip_low", 0.3),
    "epsilon_high": (0.4, "policy.clip_high", 0.4),
    "loss_type": ("dr_grpo", "policy.reduction", "constant"),
    "scale_rewards": ("batch", "advantage.scale", "batch_std"),
    "importance_sampling_level": ("sequence", "policy.level", "sequence"),
    "delta": (1.5, "policy.ratio_cap", 1.5),
    "top_entropy_quantile": (0.2, "policy.entropy_share", 0.2),
    "use_bias_correction_kl": (True, "policy.kl_weighted", True, WITH_KL),
    "off_policy_mask_threshold": (0.5, "policy.sequence_mask", 0.5),
    "multi_objective_aggregation": ("normalize_then_sum", "advantage.aggregation", "normalize_then_sum"),
    "sapo_temperature_pos": (2.0, "policy.sapo_positive", 2.0, SAPO),
    "sapo_temperature_neg": (2.0, "policy.sapo_negative", 2.0, SAPO),
    "max_completion_length": (77, "policy.constant_length", 77),
    "algorithm.dynamic_sampling": (True, "filter.dynamic_sampling", True),
    "algorithm.max_draws": (3, "filter.max_draws", 3, DYNAMIC),
    "algorithm.difficulty_low": (0.2, "filter.difficulty_low", 0.2),
    "algorithm.difficulty_high": (0.8, "filter.difficulty_high", 0.8),
    "algorithm.overlong_buffer": (0.5, "shaping.overlong_buffer", 0.5),
    "algorithm.overlong_factor": (2, "shaping.overlong_factor", 2.0, {"overlong_buffer": 0.5}),
    "algorithm.length_penalty": (0.1, "shaping.length_penalty", 0.1),
    "algorithm.running_norm": ("scale", "shaping.running_norm", "scale"),
    "algorithm.reward_clip": (5, "shaping.reward_clip", 5.0),
    "algorithm.baseline": ("leave_one_out", "advantage.baseline", "leave_one_out"),
    "algorithm.scale": ("none", "advantage.scale", "none"),
    "algorithm.aggregation": ("normalize_then_sum", "advantage.aggregation", "normalize_then_sum"),
    "algorithm.group_weight": ("informative", "advantage.group_weight", "informative"),
    "algorithm.group_weight_cap": (3, "advantage.group_weight_cap", 3.0, WEIGHTED),
    "algorithm.gamma": (0.99, "advantage.gamma", 0.99),
    "algorithm.whiten": (True, "advantage.whiten", True),
    "algorithm.advantage_clip": (5, "advantage.advantage_clip", 5.0),
    "algorithm.objective": ("cispo", "policy.objective", "cispo"),
    "algorithm.level": ("sequence", "policy.level", "sequence"),
    "algorithm.clip_low": (0.3, "policy.clip_low", 0.3),
    "algorithm.clip_high": (0.4, "policy.clip_high", 0.4),
    "algorithm.dual_clip": (3, "policy.dual_clip", 3.0),
    "algorithm.ratio_cap": (1.5, "policy.ratio_cap", 1.5),
    "algorithm.drift_coef": (0.2, "policy.drift_coef", 0.2, CPGD),
    "algorithm.drift_clip": (1, "policy.drift_clip", 1.0, CPGD),
    "algorithm.sapo_positive": (2, "policy.sapo_positive", 2.0, SAPO),
    "algorithm.sapo_negative": (2, "policy.sapo_negative", 2.0, SAPO),
    "algorithm.cov_share": (0.1, "policy.cov_share", 0.1, COVARIANCE),
    "algorithm.cov_low": (-1, "policy.cov_low", -1.0, COVARIANCE),
    "algorithm.cov_high": (9, "policy.cov_high", 9.0, COVARIANCE),
    "algorithm.cov_coef": (0.1, "policy.cov_coef", 0.1, {"recipe": "kl_cov"}),
    "algorithm.dro_coef": (0.2, "policy.dro_coef", 0.2, {"objective": "dro"}),
    "algorithm.gvpo_coef": (0.2, "policy.gvpo_coef", 0.2, {"objective": "gvpo"}),
    "algorithm.vespo_positive": ([1, 2], "policy.vespo_positive", (1.0, 2.0), VESPO),
    "algorithm.vespo_negative": ([1, 2], "policy.vespo_negative", (1.0, 2.0), VESPO),
    "algorithm.entropy_share": (0.2, "policy.entropy_share", 0.2),
    "algorithm.entropy_scope": ("sequence", "policy.entropy_scope", "sequence", {"entropy_share": 0.5}),
    "algorithm.correction": ("mask", "policy.correction", "mask"),
    "algorithm.correction_level": ("geometric", "policy.correction_level", "geometric", CORRECTED),
    "algorithm.correction_low": (0.5, "policy.correction_low", 0.5, CORRECTED),
    "algorithm.correction_high": (5, "policy.correction_high", 5.0, CORRECTED),
    "algorithm.sequence_mask": (0.5, "policy.sequence_mask", 0.5),
    "algorithm.reduction": ("sequence_sum", "policy.reduction", "sequence_sum"),
    "algorithm.kl_coef": (0.1, "policy.kl_coef", 0.1),
    "algorithm.kl_kind": ("k3+", "policy.kl_kind", "k3+", WITH_KL),
    "algorithm.kl_weighted": (True, "policy.kl_weighted", True, WITH_KL),
    "algorithm.kl_in_reward": (True, "kl.kl_in_reward", True),
    "algorithm.kl_target": (0.05, "kl.kl_target", 0.05, WITH_KL),
    "algorithm.kl_horizon": (500, "kl.kl_horizon", 500, {**WITH_KL, "kl_target": 0.05}),
}


@pytest.mark.parametrize("path", RECIPE)
def test_recipe(path):
    """Each field changes one thing of the recipe; what that does is shown in tests/algorithms/test_recipes.py."""
    value, where, inside, *besides = RECIPE[path]
    section, _, name = path.rpartition(".")
    data = {"algorithm": dict(*besides)}
    before = dataclasses.asdict(parts.build_recipe(from_dict(data)))
    (data["algorithm"] if section else data)[name] = value
    after = dataclasses.asdict(parts.build_recipe(from_dict(data)))
    part, _, field = where.partition(".")
    assert before[part][field] != inside
    before[part][field] = inside
    assert after == before


@pytest.mark.parametrize("name", [name for name in alg.recipes() if name != "ppo"])
def test_named_recipe(name):
    """``recipe``: the named one, but for the length that a constant reduction divides by."""
    built = parts.build_recipe(from_dict({"algorithm": {"recipe": name}, "max_completion_length": 50}))
    assert built == alg.recipe(name).with_overrides({"constant_length": 50})


def test_unknown_recipe():
    with pytest.raises(ConfigError, match=r"^algorithm\.recipe: got 'dpo', takes .*dapo"):
        parts.build_recipe(from_dict({"algorithm": {"recipe": "dpo"}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "ppo"}, "algorithm.recipe: ppo needs a critic, which this version does not have; takes another"),
        ({"estimator": "gae"}, "algorithm.estimator: gae needs a critic, which this version does not have; takes anot"),
        ({"lam": 0.9}, "algorithm.lam: set without estimator: gae, which alone reads it; remove it"),
        ({"length_alpha": 0.05}, "algorithm.length_alpha: set without estimator: gae, which alone reads it; remove it"),
    ],
)
def test_fields_of_a_critic(fields, message):
    """They are refused, not passed over: ``recipe``, ``estimator``, ``lam``, ``length_alpha``."""
    with pytest.raises(ConfigError) as caught:
        parts.build_recipe(from_dict({"algorithm": fields}))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delta": 1.1}, "delta: got 1.1, takes more than 1 + clip_high (1.2)"),
        ({"algorithm": {"ratio_cap": 1.1}}, "algorithm.ratio_cap: got 1.1, takes more than"),
        ({"sapo_temperature_pos": 2}, "sapo_temperature_pos: got 2.0, which clip does not read; remove it"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl: set without kl_coef"),
        ({"algorithm": {"objective": "sapoo"}}, "algorithm.objective: got 'sapoo', takes"),
        ({"algorithm": {"vespo_positive": [1]}}, "algorithm.vespo_positive: got [1.0], takes two numbers, [k, lambda]"),
        ({"algorithm": {"objective": "vespo", "vespo_negative": [1, -1]}}, "algorithm.vespo_negative: got [1, -1]"),
    ],
)
def test_what_a_recipe_refuses_is_named_as_it_was_given(values, message):
    with pytest.raises(ConfigError) as caught:
        parts.build_recipe(from_dict(values))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ the section and the recipe are the same thing


def recipe_fields() -> dict[str, tuple[type, object]]:
    """Field -> its type and default, over all parts of a recipe."""
    parts_of = [type(getattr(alg.Recipe(), field.name)) for field in dataclasses.fields(alg.Recipe)]
    names = [field.name for part in parts_of for field in dataclasses.fields(part)]
    assert len(names) == len(set(names)), "two parts have a field of one name"
    return {
        field.name: (typing.get_type_hints(part)[field.name], field.default)
        for part in parts_of
        for field in dataclasses.fields(part)
    }


def test_the_section_has_the_fields_of_a_recipe():
    ours = [field.name for field in dataclasses.fields(AlgorithmConfig)]
    theirs = [name for name in recipe_fields() if name != "constant_length"]
    assert ours == ["recipe", *theirs], "in the same order too"


def plain(hint: object) -> set[object]:
    """The choices or types that a hint allows, without None."""
    if hint == tuple[float, float]:
        return {list[float]}
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else ()
    return set().union(*map(plain, options)) if options else {hint} - {type(None)}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(AlgorithmConfig) if f.name != "recipe"])
def test_a_field_of_the_section_takes_what_the_recipes_takes(name):
    hint = typing.get_type_hints(AlgorithmConfig)[name]
    assert type(None) in typing.get_args(hint), "None stands for the recipe's value"
    assert plain(hint) == plain(recipe_fields()[name][0])
    assert getattr(RLConfig().algorithm, name) is None


def test_the_help_names_every_recipe_and_objective():
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(AlgorithmConfig)}
    from jaxrft.algorithms.objectives import SURROGATES

    assert [name for name in alg.recipes() if name not in helps["recipe"]] == []
    assert [name for name in SURROGATES if name not in helps["objective"]] == []
