"""Value networks and reward models under every strategy, and a large model that is compiled from shapes alone."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft.models import Decoder, ScalarModel
from jaxrft.parallel.host import to_device, to_host
from tests.conftest import QUICK_TO_COMPILE, ROOT
from tests.parallel.updates import SPEC, STRATEGIES


def run_module(module, *arguments, devices, timeout, **changes):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), **changes
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", f"tests.parallel.{module}", *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_value_networks_and_reward_models_train_alike_under_every_strategy():
    found = run_module("scalars", devices=8, timeout=400, XLA_FLAGS=QUICK_TO_COMPILE)
    assert len(found) == len(STRATEGIES)
    for record in found:
        assert record["value"] < 1e-5, record
        assert record["reward"] < 1e-5, record
        assert record["bytes"] == [record["expected"]] * 8, record
        assert record["whole"] == []


def test_scores_are_values_at_the_last_valid_token():
    model = ScalarModel(SPEC, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (3, 9))), jnp.array([9, 1, 4])
    values, scores = model.values(tokens, lengths), model.scores(tokens, lengths)
    assert values.shape == (3, 9)
    hidden = np.asarray(model.decoder.hidden(tokens, lengths))
    expected = hidden @ np.asarray(model.head.kernel[...])
    np.testing.assert_allclose(values, expected[..., 0], atol=1e-5)
    np.testing.assert_array_equal(scores, np.asarray(values)[np.arange(3), np.asarray(lengths) - 1])
    # What stands behind a row does not reach its score.
    changed = tokens.at[1, 1:].set(5).at[2, 4:].set(7)
    np.testing.assert_allclose(model.scores(changed, lengths), scores, atol=1e-5)
    # No projection to the vocabulary is kept, and nothing else is changed.
    names = {path for path, _ in nnx.to_flat_state(nnx.state(model.decoder, nnx.Param))}
    full = {path for path, _ in nnx.to_flat_state(nnx.state(Decoder(SPEC, rngs=nnx.Rngs(0)), nnx.Param))}
    assert full - names == {("lm_head", "kernel")}


def test_a_reward_model_lies_in_the_hosts_memory_between_uses():
    model = ScalarModel(SPEC, rngs=nnx.Rngs(0))
    tokens, lengths = jnp.ones((2, 5), jnp.int32), jnp.array([5, 3])
    graphdef, params = nnx.split(model)
    expected = np.asarray(model.scores(tokens, lengths))
    kept = to_host(params)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept)} == {"pinned_host"}
    used = to_device(kept)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(used)} == {"device"}
    np.testing.assert_array_equal(nnx.merge(graphdef, used).scores(tokens, lengths), expected)


def check_lowered(records):
    for record in records:
        assert record["parameters"] == 7_615_616_512
        # Parameters and moments are where the description says; each device holds no byte of them beside that.
        assert 0 <= record["aliased"] - record["state"] < 1024, record
        assert record["arguments"] - record["state"] < 2 * record["batch"] + 2**20, record
        assert record["whole"] == [], record
        assert 0 < record["temporary"] < 4 * 4 * record["parameters"], record


def test_a_model_of_7_billion_parameters_is_compiled_for_8_devices():
    (record,) = run_module("lowering", "8", "zero3", devices=8, timeout=400, XLA_FLAGS=QUICK_TO_COMPILE)
    check_lowered([record])
    assert record["state"] == pytest.approx(12 * record["parameters"] / 8, rel=0.001)
    # One gathered layer and the projection at a time: far from the 30 GB of all parameters.
    assert record["temporary"] < 4 * record["parameters"]


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("devices", [8, 64])
def test_a_model_of_7_billion_parameters_is_compiled_for_every_strategy(devices):
    found = run_module("lowering", str(devices), *STRATEGIES, devices=devices, timeout=1400)
    assert [record["strategy"] for record in found] == list(STRATEGIES)
    check_lowered(found)
    by_name = {record["strategy"]: record for record in found}
    assert by_name["zero2"]["temporary"] < by_name["zero1"]["temporary"]
    assert by_name["zero3"]["temporary"] < by_name["zero2"]["temporary"]
