"""Generating from 8-bit kernels: against NumPy's own quantisation, and what the compiler makes of it."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft.config import ConfigError
from jaxrft.models import Decoder
from jaxrft.models.projection import project
from jaxrft.models.quantization import DTYPE, QuantizedKernel, quantize
from jaxrft.rollout import NativeEngine, SamplingParams
from jaxrft.rollout.programs import Programs
from tests.rollout.tiny import (
    EOS,
    SPEC,
    forward_logprobs,
    own_leaves,
    prompts_of,
    random_model,
    random_requests,
    tokens_of,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, seed=5)
KERNELS = 14  # of two layers: four of attention, three of the feed-forward block


def in_eight_bits(kernel: np.ndarray) -> np.ndarray:
    """What a kernel is after float8 e4m3 with a scale for each column: 3 bits behind the leading one, down to 2**-9."""
    kernel = kernel.astype(np.float32)
    scale = np.abs(kernel).max(axis=0) / np.float32(448)
    values = kernel / scale
    exponent = np.maximum(np.frexp(values)[1] - 1, -6)
    step = np.ldexp(np.float32(1), exponent - 3)
    return np.rint(values / step) * step * scale


def is_kernel(path) -> bool:
    keys = [str(getattr(key, "key", key)) for key in path]
    return "kernel" in keys and "lm_head" not in keys


def dequantized(model: Decoder) -> Decoder:
    """A plain model with the values that 8 bits leave of its kernels."""
    graphdef, params = nnx.split(model)

    def value(path, x):
        return jnp.asarray(in_eight_bits(np.asarray(x)), x.dtype) if is_kernel(path) else x

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, params))


def engine_of(model, quantization="fp8", **options) -> NativeEngine:
    settings = {"max_slots": 8, "max_length": 32, "eos_token_ids": [EOS], "quantization": quantization}
    return NativeEngine(model, **settings | options)


@pytest.mark.parametrize("tie", [True, False])
def test_it_generates_as_a_model_of_the_dequantized_weights(tie) -> None:
    model = random_model(spec=dataclasses.replace(SPEC, tie_embeddings=tie))
    requests, plain = random_requests(8, seed=2), dequantized(model)
    for sampling in (GREEDY, DRAWN):
        with engine_of(model) as engine, engine_of(plain, "none") as other:
            completions, expected = engine.generate(requests, sampling), other.generate(requests, sampling)
        assert tokens_of(completions) == tokens_of(expected)
        for one, two in zip(completions, expected):
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)
            np.testing.assert_allclose(one.sampled_logprobs, two.sampled_logprobs, atol=1e-4)
    # The log-probabilities are those of what was sampled from, not of the model that was handed over.
    prompts = prompts_of(requests)
    given, true = (forward_logprobs(m, prompts, completions, DRAWN.temperature) for m in (model, plain))
    for one, logprobs in zip(completions, true):
        np.testing.assert_allclose(one.logprobs, logprobs, atol=1e-4)
    assert max(np.abs(a - b).max() for a, b in zip(given, true)) > 0.01


def test_values_and_scales() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((64, 6)).astype(np.float32) * np.float32([1, 1e-6, 1e6, 0, 1, 1])
    kernel[3, 4] = np.nan
    made = quantize(jnp.asarray(kernel))
    assert (made.values.dtype, made.scale.dtype, made.shape) == (DTYPE, jnp.float32, (64, 6))
    back = np.asarray(made.values, np.float32) * np.asarray(made.scale)
    sound = [0, 1, 2, 5]
    np.testing.assert_allclose(back[:, sound], in_eight_bits(kernel[:, sound]), rtol=1e-6)
    assert np.abs(back[:, sound]).max(axis=0) == pytest.approx(np.abs(kernel[:, sound]).max(axis=0), rel=1e-6)
    np.testing.assert_array_equal(back[:, 3], 0)
    # A model that is broken stays recognisable as one.
    assert np.isnan(back[:, 4]).any()


def test_products_do_not_overflow_float16() -> None:
    """Values reach 448 whatever the kernel's size: unscaled sums would be infinite."""
    kernel = jnp.full((512, 4), 0.01, jnp.float32)
    x = jnp.ones((1, 512), jnp.float16)
    y = project(x, quantize(kernel), ("embed", "mlp"), (512, 4))
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 512 * 0.01, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_the_engines_kernels(dtype, share) -> None:
    model = random_model(spec=dataclasses.replace(SPEC, hidden_size=128, intermediate_size=256), dtype=jnp.dtype(dtype))
    with engine_of(model) as engine, engine_of(model, "none") as plain:
        own, other = (own_leaves(e._programs, e._leaves, dtype) for e in (engine, plain))
    kernels = [leaf for leaf in own if isinstance(leaf, QuantizedKernel)]
    assert len(kernels) == KERNELS
    whole = [other[i] for i, leaf in enumerate(own) if isinstance(leaf, QuantizedKernel)]
    scales = sum(kernel.scale.nbytes for kernel in kernels)
    assert sum(leaf.nbytes for leaf in whole) == share * sum(kernel.values.nbytes for kernel in kernels)
    assert scales < 0.05 * sum(kernel.values.nbytes for kernel in kernels)
    # All else is what it is without.
    for leaf, same in zip(own, other):
        if not isinstance(leaf, QuantizedKernel):
            np.testing.assert_array_equal(leaf, same)


def loop_of(model: Decoder, monkeypatch) -> str:
    """What the compiled loop over tokens carries and reads, as XLA writes it."""
    texts = []
    call = Programs._call

    def watched(self, key, program, *arguments, **statics):
        if key[0] == "decode" and not texts:
            texts.append(program.lower(*arguments, **statics).compile().as_text())
        return call(self, key, program, *arguments, **statics)

    monkeypatch.setattr(Programs, "_call", watched)
    with engine_of(model) as engine:
        engine.generate(random_requests(2), GREEDY)
    [line] = [line for line in texts[0].splitlines() if re.search(r" while\(", line)]
    return line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_over_tokens_reads_eight_bits(dtype, monkeypatch) -> None:
    """A conversion that is moved out of the loop is made once, and wider kernels are read in every step."""
    # Shapes of no other test, whose programs are kept.
    model = random_model(spec=dataclasses.replace(SPEC, intermediate_size=40), dtype=jnp.dtype(dtype))
    shapes = [x.shape for path, x in jax.tree_util.tree_leaves_with_path(nnx.split(model)[1]) if is_kernel(path)]
    names = [f"[{inputs},{outputs}]" for inputs, outputs in shapes]
    line = loop_of(model, monkeypatch)
    assert line.count("f8e4m3fn[") == len(names) == KERNELS
    assert all(f"f8e4m3fn{name}" in line for name in names)
    assert not any(re.search(rf"\b(f32|bf16){re.escape(name)}", line) for name in names)


def test_without_its_barrier_the_conversion_leaves_the_loop(monkeypatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operand: operand)
    model = random_model(spec=dataclasses.replace(SPEC, intermediate_size=48))
    assert "f8e4m3fn[" not in loop_of(model, monkeypatch)


def test_an_engine_beside_it_is_not_quantized(model) -> None:
    """Programs are shared by engines of a model's shape, but not by these two; and each counts its own."""
    requests = random_requests(4)
    with engine_of(model, "none") as plain:
        expected = tokens_of(plain.generate(requests, DRAWN))
    with engine_of(model) as engine:
        engine.generate(requests, DRAWN)
        engine.update_weights(nnx.split(random_model(3))[1], version=1)
        after = engine.generate(requests, DRAWN)
    with engine_of(random_model(3)) as fresh:
        assert tokens_of(fresh.generate(requests, DRAWN)) == tokens_of(after)
    with engine_of(model, "none") as plain:
        assert tokens_of(plain.generate(requests, DRAWN)) == expected
        assert plain.compilations == 0


def test_unknown_quantization_is_refused(model) -> None:
    with pytest.raises(ConfigError, match="quantization: got 'int3', takes none or fp8"):
        engine_of(model, "int3")


def test_on_a_mesh_it_is_what_it_is_on_one_device(run_python) -> None:
    """Kernels lie sharded over the tensor axis, and each device has the scales of its own channels."""
    run_python(
        """
        import dataclasses
        import jax, numpy as np
        from flax import nnx
        from jaxrft.parallel import Layout, make_mesh
        from tests.rollout.test_quantization import DRAWN, QuantizedKernel, engine_of
        from tests.rollout.tiny import SPEC, own_leaves, random_model, random_requests, tokens_of

        requests = random_requests(6, seed=1)
        graphdef, params = nnx.split(random_model(spec=dataclasses.replace(SPEC, intermediate_size=40)))
        for sizes in ({"replica": 4, "tensor": 2}, {"replica": 2, "tensor": 4}, {"replica": 8}):
            layout = Layout(make_mesh(**sizes))
            placed = jax.device_put(params, layout.shardings("params", params))
            with engine_of(nnx.merge(graphdef, params)) as engine:
                expected = engine.generate(requests, DRAWN)
                engine.update_weights(placed, version=1)
                completions = engine.generate(requests, DRAWN)
                own = own_leaves(engine._programs, engine._leaves, "float32")
            assert tokens_of(completions) == tokens_of(expected), sizes
            for one, two in zip(completions, expected):
                np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)
            tensor = sizes.get("tensor", 1)
            shards = [leaf.values.addressable_shards[0].data.size * tensor == leaf.values.size
                      for leaf in own if isinstance(leaf, QuantizedKernel)]
            # With two heads of keys and values for four devices, these stay whole.
            assert sum(shards) == (10 if tensor == 4 else 14), shards
        """.replace("\n        ", "\n"),
        devices=8,
    )
