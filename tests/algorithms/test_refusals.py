"""What is wrong, missing or without effect is refused, by name."""

import jax.numpy as jnp
import pytest

from jaxrft import algorithms as alg


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "clpi"}, "objective: got 'clpi', takes clip, .*; did you mean clip"),
        ({"level": "sequense"}, "level: got 'sequense'.*did you mean sequence"),
        ({"reduction": "token_men"}, "reduction: .*sequence_sum or constant; did you mean token_mean"),
        ({"correction": "trunc"}, "correction: .*did you mean truncate"),
        ({"correction_level": "row"}, "correction_level: got 'row', takes token, sequence or geometric"),
        ({"entropy_scope": "row"}, "entropy_scope: got 'row', takes batch or sequence"),
        ({"kl_kind": "K3"}, r"kl_kind: got 'K3', takes k1, k2, k3, k1\+ or k3\+"),
        ({"clip_low": -0.1}, "clip_low: got -0.1, takes at least 0"),
        ({"clip_high": float("nan")}, "clip_high: got nan, takes at least 0"),
        ({"dual_clip": 0.5}, "dual_clip: got 0.5, takes at least 1"),
        ({"constant_length": 0}, "constant_length: got 0, takes at least 1"),
        ({"kl_coef": -1.0}, "kl_coef: got -1.0, takes at least 0"),
        ({"entropy_share": 1.2}, "entropy_share: got 1.2, takes 0 to 1"),
        ({"sequence_mask": -1.0}, "sequence_mask: got -1.0, takes at least 0"),
        ({"correction_low": 3.0}, "correction_low: got 3.0, takes at most correction_high"),
        ({"objective": "sapo", "sapo_positive": 0.0}, "sapo_positive: got 0.0"),
        ({"objective": "vespo", "vespo_positive": (1.0,)}, "vespo_positive: .*two numbers"),
        ({"objective": "kl_cov", "cov_share": 2.0}, "cov_share: got 2.0, takes 0 to 1"),
        ({"ratio_cap": 1.2}, "ratio_cap: got 1.2, takes more than 1 \\+ clip_high"),
        ({"ratio_cap": 1.2, "clip_high": 0.3}, "ratio_cap: got 1.2"),
        ({"objective": "cispo", "level": "geometric"}, "level: got 'geometric', takes token or sequence with cispo"),
        ({"objective": "reinforce", "level": "sequence"}, "level: got 'sequence', takes token with reinforce"),
        ({"objective": "gvpo", "level": "sequence_token"}, "level: got 'sequence_token', takes sequence with gvpo"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        alg.PolicyObjective(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"level": "geometric", "dual_clip": 3.0}, "dual_clip: .*geometric"),
        ({"level": "geometric", "ratio_cap": 3.0}, "ratio_cap: .*geometric"),
        ({"objective": "sapo", "clip_high": 0.3}, "clip_high: got 0.3, which sapo does not read"),
        ({"drift_coef": 0.1}, "drift_coef: got 0.1, which clip does not read"),
        ({"objective": "reinforce", "epsilon": 0.3}, "recipe field: got 'epsilon'"),
        ({"entropy_scope": "sequence"}, "entropy_scope: set without entropy_share"),
        ({"correction_high": 3.0}, "correction_high: set without correction"),
        ({"correction_level": "sequence"}, "correction_level: set without correction"),
        ({"kl_weighted": True}, "kl_weighted: set without kl_coef"),
        ({"kl_weighted": True, "kl_coef": 0.1, "kl_kind": "k3+"}, "kl_kind: got 'k3\\+', takes one without a plus"),
        ({"kl_kind": "k1"}, "kl_kind: set without kl_coef"),
        ({"max_draws": 3}, "max_draws: set without dynamic_sampling"),
        ({"kl_horizon": 3}, "kl_horizon: set without kl_target"),
    ],
)
def test_overrides_that_change_nothing(fields, message):
    """An objective may hold fields that it does not read; who sets one in a recipe means something by it."""
    with pytest.raises(ValueError, match=message):
        alg.recipe("grpo").with_overrides(fields)


FULL, ROW, FLAT = jnp.zeros((2, 3)), jnp.zeros((1, 3)), jnp.zeros(2)


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({"correction": "mask"}, {}, "sampler_logprobs: needed"),
        ({"sequence_mask": 0.1}, {}, "sampler_logprobs: needed"),
        ({"entropy_share": 0.1}, {}, "entropies: needed"),
        ({"kl_coef": 0.1}, {}, "ref_logprobs: needed"),
        ({}, {"kl_coef": 0.1}, "ref_logprobs: needed"),
        ({"objective": "clip_cov"}, {}, "key: "),
        ({"reduction": "constant"}, {}, "constant_length: the reduction 'constant' needs one"),
        ({"correction": "mask"}, {"sampler_logprobs": ROW}, r"sampler_logprobs: got shape \(1, 3\), takes \(2, 3\)"),
        ({"entropy_share": 0.1}, {"entropies": ROW}, r"entropies: got shape \(1, 3\), takes \(2, 3\)"),
        ({"kl_coef": 0.1}, {"ref_logprobs": ROW}, r"ref_logprobs: got shape \(1, 3\), takes \(2, 3\)"),
        ({}, {"old_logprobs": ROW}, r"old_logprobs: got shape \(1, 3\), takes \(2, 3\)"),
        ({}, {"advantages": jnp.zeros(3)}, r"advantages: got shape \(3,\), takes \(2, 3\) or \(2,\)"),
        ({}, {"mask": jnp.zeros((1, 1))}, r"logprobs: got shape \(2, 3\), takes \(1, 1\)"),
    ],
)
def test_wrong_inputs(fields, inputs, message):
    given = {"old_logprobs": FULL, "advantages": FLAT, "mask": FULL, **inputs}
    with pytest.raises(ValueError, match=message):
        alg.policy_loss(alg.PolicyObjective(**fields), FULL, **given)


def test_wrong_inputs_of_the_other_functions():
    with pytest.raises(ValueError, match=r"old_values: got shape \(1, 3\), takes \(2, 3\)"):
        alg.value_loss(FULL, ROW, FULL, FULL)
    with pytest.raises(ValueError, match="reduction: got 'mean', takes token_mean"):
        alg.token_weights(FULL, "mean", alg.totals(FULL))
