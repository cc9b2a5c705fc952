"""However the layers are run and whatever is kept of them: one value and one gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft.models.decoder import Decoder
from jaxrft.models.elementwise import rms_norm, swiglu
from jaxrft.models.logprobs import token_logprobs
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.stack import TENSOR_NAMES, Remat
from tests.jaxprs import count

SPEC = DecoderSpec(
    vocab_size=31,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=64,
    qkv_bias=True,
    sliding_windows=(None, 3, None),
    init_stddev=0.3,
)
WAYS = {
    "full": (Remat("full"), False),
    "save": (Remat("save"), False),
    "save_inputs": (Remat("save", ("layer_input", "gate")), False),
    "offload": (Remat("offload"), False),
    "offload_all": (Remat("offload", TENSOR_NAMES), False),
    "scan": (Remat(), True),
    "scan_full": (Remat("full"), True),
    "scan_save": (Remat("save"), True),
    "scan_offload": (Remat("offload", ("layer_input", "attention")), True),
}


@functools.cache
def differentiated(remat, scan, dtype=jnp.float32):
    """Loss with the sum of its terms' sizes, gradients, and the jaxpr of a packed batch."""
    model = Decoder(SPEC, dtype=dtype, rngs=nnx.Rngs(0))
    model.remat, model.scan_layers = remat, scan
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (3, 11))
    segments = np.array([[1] * 4 + [2] * 7, [1] * 11, [1] * 2 + [2] * 3 + [3] * 6])
    weights = jnp.asarray(rng.normal(size=(3, 10)), jnp.float32)

    def loss(params):
        merged = nnx.merge(graphdef, params)
        logprobs, entropy = token_logprobs(merged, tokens, np.full(3, 11), segment_ids=segments)
        terms = weights * logprobs + 0.1 * entropy
        return jnp.sum(terms), jnp.sum(jnp.abs(terms))

    (value, size), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return (
        (float(value), float(size)),
        [np.asarray(g) for g in jax.tree.leaves(gradients)],
        jax.make_jaxpr(jax.grad(loss, has_aux=True))(params),
    )


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_unrolled_layers_that_keep_all(way):
    (value, _), gradients, _ = differentiated(*WAYS[way])
    (expected_value, size), expected, _ = differentiated(Remat(), False)
    # Its terms have both signs: what is rounded is as large as they are, not as their sum.
    assert abs(value - expected_value) <= 1e-6 * size
    for got, wanted in zip(gradients, expected, strict=True):
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_the_policies_are_in_the_program():
    programs = {way: differentiated(*WAYS[way])[2] for way in WAYS} | {"none": differentiated(Remat(), False)[2]}
    products = {way: count(program.jaxpr, "dot_general") for way, program in programs.items()}
    # A layer that is computed again has its nine products once more, but for the last, which no gradient needs; with
    # query, key, value and attention kept, the three that give these and attention's second are left out too.
    layers = SPEC.num_layers
    assert products["full"] == products["none"] + 8 * layers
    assert products["save"] == products["none"] + 4 * layers
    assert products["offload"] == products["save"]
    assert products["scan_full"] == products["scan"] + 8
    assert products["scan"] < products["none"] / 2
    assert "host" in str(programs["offload"])
    assert "host" not in str(programs["save"])


def test_remat_keeps_less():
    """Of the compiled program, with layers in a loop (the CPU's compiler undoes it where they are unrolled)."""
    wide = dataclasses.replace(
        SPEC, num_layers=6, hidden_size=64, intermediate_size=256, head_dim=16, sliding_windows=()
    )
    temp = {}
    for policy in ("none", "save", "full"):
        model = nnx.eval_shape(lambda: Decoder(wide, rngs=nnx.Rngs(0)))
        model.remat, model.scan_layers = Remat(policy), True
        graphdef, params = nnx.split(model)

        def loss(params, tokens, graphdef=graphdef):
            return jnp.sum(token_logprobs(nnx.merge(graphdef, params), tokens, jnp.full(8, 128))[0])

        tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        temp[policy] = compiled.memory_analysis().temp_size_in_bytes
    # Each layer of the six keeps one tensor of the width, or the four named ones beside it; none also keeps scores.
    element = 4 * 8 * 128 * 6
    named = element * (4 * 16 + 2 * 2 * 16 + 4 * 16)
    assert temp["save"] - temp["full"] == pytest.approx(named, rel=0.1)
    assert temp["none"] - temp["save"] > element * (3 * 256 + 4 * 128)


def test_unknown_policies_and_names_are_refused():
    with pytest.raises(ValueError, match=r"^remat: got 'some', takes none, full, save or offload$"):
        Remat("some")
    with pytest.raises(ValueError, match=r"^remat_names: got 'scores', takes layer_input, query"):
        Remat("save", ("scores",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_functions_with_gradients_of_their_own(dtype):
    """Against JAX's derivative of the same formula."""
    rng = np.random.default_rng(1)
    x, y, d = (jnp.asarray(rng.normal(size=(5, 7)), dtype) for _ in range(3))
    scale = jnp.asarray(rng.normal(size=7), jnp.float32)

    def plain_norm(x, scale):
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)
        return (normed.astype(x.dtype) * scale).astype(x.dtype)

    pairs = [
        (swiglu, lambda g, u: jax.nn.silu(g) * u, (x, y)),
        (lambda x, s: rms_norm(x, s, 1e-6), plain_norm, (x, scale)),
    ]
    limit = 1e-5 if dtype == "float32" else 2e-2
    for ours, plain, arguments in pairs:
        value, pull = jax.vjp(ours, *arguments)
        expected, expected_pull = jax.vjp(plain, *arguments)
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(expected, np.float32))
        for got, wanted in zip(pull(d), expected_pull(d)):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(
                np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=limit, atol=limit
            )
