"""Types of parameters and of computation in whole optimizer steps: overflows, NaN batches, rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrft import models
from jaxrft.config import ModelConfig, WarmStartConfig
from jaxrft.models.decoder import Decoder
from jaxrft.models.layers import Linear
from jaxrft.models.logprobs import token_logprobs
from jaxrft.training import warm_start
from jaxrft.training.batch import make_batch
from jaxrft.training.checkpoint import Checkpoints
from jaxrft.training.state import make_init
from tests.jaxprs import equations
from tests.models.configs import CASES, SHAPE
from tests.training.learners import LONGEST, VOCAB, bit_equal, host, initial_model, learner_of, make_samples


def make_learner(model=None, **changes):
    """A learner whose model computes as ``model`` says, with the parameters of ``learners.make_model``."""
    settings = model or ModelConfig()
    graphdef, params = initial_model(VOCAB)
    spec = nnx.merge(graphdef, params).spec
    module = Decoder(spec, dtype=jnp.dtype(settings.dtype), rngs=nnx.Rngs(0))
    kept = jnp.dtype(settings.param_dtype)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(p, kept), params))
    return learner_of(module, 8, model=settings, beta=0.0, max_completion_length=LONGEST, **changes)


def steps(learner, count, seed=0):
    stats = []
    for number in range(count):
        batch = learner.prepare(make_samples(8, seed=seed + number), score_old=True)
        stats += list(learner.update(batch, 9, None))
    return stats


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_a_bias_is_summed_in_float32(dtype):
    """JAX sums what was broadcast in its own type, where 2049 ones of bfloat16 make 2048 at best."""
    layer = Linear(8, 4, ("embed", "heads"), bias=True, stddev=0.1, rngs=nnx.Rngs(0))
    x = jnp.ones((3, 683, 8), dtype)

    def loss(layer):
        return jnp.sum(layer(x).astype(jnp.float32))

    gradient = nnx.jit(nnx.grad(loss))(layer)["bias"][...]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [2049.0] * 4)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_summed_in_16_bits(case):
    """In the whole model's gradient, by us or by what JAX makes of broadcasts."""
    model = models.from_config({**SHAPE, **CASES[case]}, dtype="bfloat16")
    graph, state = nnx.split(model)
    tokens = jnp.zeros((2, 16), jnp.int32)

    def loss(state):
        return token_logprobs(nnx.merge(graph, state), tokens, jnp.full(2, 16))[0].sum()

    trace = jax.make_jaxpr(jax.grad(loss))(state)
    sums = [e for e, _ in equations(trace.jaxpr) if e.primitive.name in ("reduce_sum", "cumsum", "reduce_window_sum")]
    assert len(sums) > 10
    assert not [e for e in sums if e.invars[0].aval.dtype.itemsize < 4]


def test_an_overflow_in_float16_is_skipped_and_recovered_from():
    """The scale is far too large at first: it is halved, nothing moves, until gradients fit; then it trains."""
    settings = ModelConfig(dtype="float16", loss_scale=2.0**24, loss_scale_steps=4)
    learner = make_learner(settings)
    before, scales, skipped = host(learner.state.params), [], []
    for number in range(24):
        (stats,) = steps(learner, 1, seed=number)
        scales.append(stats["loss_scale"])
        skipped.append(stats["skipped_steps"])
        if skipped[-1] == number + 1:
            assert bit_equal(learner.state.params, before)
            assert not any(m.any() for m in host(learner.state.opt_state))
    first = next(i for i, count in enumerate(skipped) if count <= i)
    assert 2 <= first <= 20
    assert scales[: first + 1] == [2.0 ** (24 - i) for i in range(first + 1)]
    assert not bit_equal(learner.state.params, before)
    # Four good steps double the scale; an overflow halves it again, and is counted.
    assert scales[first + 4] == 2 * scales[first]


def test_float16_trains_as_float32_does():
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        learner = make_learner(ModelConfig(dtype=dtype))
        found[dtype] = steps(learner, 3), host(learner.state.params)
    start = host(nnx.state(nnx.merge(*initial_model(VOCAB))))
    change = np.concatenate([np.ravel(a - b) for a, b in zip(found["float32"][1], start)])
    for dtype, limit in (("float16", 0.02), ("bfloat16", 0.1)):
        other = np.concatenate([np.ravel(a - b) for a, b in zip(found[dtype][1], start)])
        assert np.linalg.norm(other - change) < limit * np.linalg.norm(change)
        for stats, exact in zip(found[dtype][0], found["float32"][0]):
            assert stats["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5 * limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_batch_of_nan_moves_nothing(dtype):
    learner = make_learner(ModelConfig(dtype=dtype))
    steps(learner, 2)
    batch = learner.prepare(make_samples(8), score_old=True)
    bad = dataclasses.replace(batch, advantages=batch.advantages.at[0, 1].set(jnp.nan))
    params, moments = host(learner.state.params), host(learner.state.opt_state)
    (stats,) = learner.update(bad, 9, None)
    assert stats["skipped_steps"] == 1
    assert bit_equal(learner.state.params, params)
    assert bit_equal(learner.state.opt_state, moments)
    (after,) = learner.update(batch, 9, None)
    assert after["skipped_steps"] == 1
    assert not bit_equal(learner.state.params, params)


def test_the_loss_scale_is_saved(tmp_path):
    settings = ModelConfig(dtype="float16", loss_scale=2.0**14, loss_scale_steps=5)
    learner = make_learner(settings)
    steps(learner, 3)
    store = Checkpoints(tmp_path, limit=1)
    store.save(3, learner.state, {}, {})
    store.wait()
    other = make_learner(settings)
    restored = store.restore(other.state)
    store.close()
    assert (float(restored.state.loss_scale.value), int(restored.state.loss_scale.good_steps)) == (2.0**14, 3)
    assert bit_equal(restored.state, learner.state)
    other.state = restored.state
    assert steps(learner, 3, seed=3) == steps(other, 3, seed=3)
    assert bit_equal(other.state, learner.state)
    assert float(other.state.loss_scale.value) == 2.0**15


def test_bfloat16_parameters_follow_float32_ones():
    """Updates of a twentieth of a unit in the last place, each of which rounding to the nearest would lose."""
    settings = {"learning_rate": 0.02, "adam_epsilon": 1.0, "weight_decay": 0.0}
    exact = make_learner(ModelConfig(dtype="bfloat16"), **settings)
    half = make_learner(ModelConfig(dtype="bfloat16", param_dtype="bfloat16"), **settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.state.params)} == {jnp.dtype("bfloat16")}
    floats = {leaf.dtype for leaf in jax.tree.leaves(half.state.opt_state) if leaf.ndim}
    assert floats == {jnp.dtype("float32")}
    starts = [flat(learner) for learner in (exact, half)]
    for _ in range(5):
        steps(exact, 6)
        steps(half, 6)
    moved, followed = (flat(learner) - start for learner, start in zip((exact, half), starts))
    units = np.abs(starts[1]) * 2.0**-8
    assert np.median(np.abs(moved) / 30 / np.maximum(units, 1e-12)) < 0.1
    noise = np.std(followed - moved) / np.linalg.norm(moved)
    assert noise < 0.03
    assert moved @ followed / (moved @ moved) == pytest.approx(1.0, abs=4 * noise)


@pytest.mark.parametrize(
    "settings",
    [ModelConfig(), ModelConfig(dtype="float16"), ModelConfig(dtype="bfloat16", param_dtype="bfloat16")],
    ids=lambda settings: f"{settings.dtype}-{settings.param_dtype}",
)
def test_the_warm_start_keeps_the_same_types(settings):
    """One supervised step is the shared update: float32 moments, a loss scale, rounding; and it learns."""
    learner = make_learner(settings, warm_start=WarmStartConfig(max_steps=10, learning_rate=0.02))
    optimizer = optax.scale_by_adam(b2=0.99)
    init, like = make_init(learner.state.params, optimizer, learner.placement, learner.first_loss_scale)
    step, state = warm_start._make_step(learner, optimizer, learner.config, like), init(learner.state.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype("float32")}
    assert float(state.scale) == (65536.0 if settings.dtype == "float16" else 1.0)
    batch, losses = make_batch(make_samples(8), 8, temperature=1.0), []
    for _ in range(12):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(settings.param_dtype)}
    if settings.dtype == "float16":
        assert int(state.loss_scale.good_steps) == 12


def flat(learner):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in host(learner.state.params)])
