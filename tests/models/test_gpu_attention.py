"""The kernels of a GPU against whole scores, as they are compiled there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.models.attention import KERNELS, attend_cached, cache_mask, causal_mask, choice
from jaxrft.models.attention.cudnn_packed import missing_interface, most_segments
from jaxrft.models.attention.probing import PROBE_TOLERANCE
from jaxrft.models.attention.triton_decode import attend_triton_decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["cudnn", "triton"])
def test_values_and_gradients(kernel, dtype, head_dim, window):
    assert choice.probe(kernel, dtype, head_dim, window, packed=kernel == "triton") is None


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_rows_by_cudnn(dtype, head_dim, window):
    needs_hopper()
    assert missing_interface() is None
    assert choice.probe("cudnn", dtype, head_dim, window, packed=True) is None


@pytest.mark.parametrize("segments", [1, 5, 32, 100])
@pytest.mark.parametrize(("kernel", "head_dim"), [("cudnn", 64), ("triton", 64), ("triton", 128), ("triton", 256)])
def test_long_packed_rows(kernel, head_dim, segments):
    """Of one segment, of as many as cuDNN's program is made for, and of more, for which it takes another way."""
    if kernel == "cudnn":
        needs_hopper()
    rng, rows, time = np.random.default_rng(0), 2, 2048
    assert most_segments(time, 64) == 32
    starts = [np.sort(rng.choice(np.arange(1, time), segments - 1, replace=False)) for _ in range(rows)]
    ids = np.stack([np.searchsorted(row, np.arange(time), side="right") for row in starts])
    shapes = [(rows, time, 14, head_dim), *[(rows, 2, time, head_dim)] * 2, (rows, time, 14, head_dim)]
    *inputs, weight = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def results(kernel):
        def loss(*inputs):
            out = KERNELS[kernel](*inputs, causal_mask(time, None, jnp.asarray(ids)))
            return jnp.sum((out * weight).astype(jnp.float32)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return out, *gradients

    for a, b in zip(results(kernel), results("dense")):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= PROBE_TOLERANCE * np.abs(b).max()


def needs_hopper():
    capability = jax.local_devices()[0].compute_capability
    if float(capability) < 9.0:
        pytest.skip(f"cuDNN takes packed rows from Hopper (9.0) on, and this GPU is of {capability}")


def test_long_packed_rows_go_to_triton():
    """Until it has been measured which of the two is faster."""
    use = choice.Use(platform="gpu", dtype="bfloat16", head_dim=128, keys=65536, packed=True)
    assert choice.choose("auto", use) == "triton"
    assert choice.choose("auto", dataclasses.replace(use, packed=False)) == "cudnn"


@pytest.mark.parametrize(("slots", "keys", "heads"), [(3, 48, 2), (64, 768, 12), (256, 4096, 14)])
def test_decoding(slots, keys, heads):
    rng = np.random.default_rng(0)
    shapes = [(slots, 1, heads, 64), *[(slots, 2, keys, 64)] * 2]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    mask = cache_mask(jnp.asarray(rng.integers(0, keys, slots)))
    got, expected = (np.float32(jax.jit(kernel)(*arrays, mask)) for kernel in (attend_triton_decode, KERNELS["dense"]))
    np.testing.assert_allclose(got, expected, atol=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("slots", "keys", "heads", "head_dim"), [(3, 64, 2, 16), (64, 768, 12, 128), (3, 4096, 14, 64), (300, 384, 6, 256)]
)
def test_decoding_writes_the_newest_tokens(slots, keys, heads, head_dim, window, dtype):
    """Five in a row, in place, as an engine does it."""
    rng = np.random.default_rng(0)
    shapes = [(slots, 1, heads, head_dim), *[(slots, 2, 1, head_dim)] * 2, *[(slots, 2, keys, head_dim)] * 2]
    query, *arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    start = jnp.asarray(rng.integers(0, keys - 5, slots))
    found = []
    for kernel in ("triton_decode", "dense"):

        def step(turn, carry, kernel=kernel):
            _, cache = carry
            new = tuple(part + turn for part in arrays[:2])
            return attend_cached(query, new, cache, cache_mask(start + turn, window, kernel), keys)

        run = jax.jit(lambda cache, step=step: jax.lax.fori_loop(0, 5, step, (query, cache)), donate_argnums=0)
        found.append(run(tuple(jnp.array(part) for part in arrays[2:])))
    (got, cache), (expected, cache_expected) = found
    # Values of the last token are up to 8.
    np.testing.assert_allclose(np.float32(got), np.float32(expected), atol=0.05)
    for part, want in zip(cache, cache_expected):
        np.testing.assert_array_equal(np.float32(part), np.float32(want))
