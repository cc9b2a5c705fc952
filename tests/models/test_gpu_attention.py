"""The kernels of a GPU against whole scores, as they are compiled there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.models.attention import KERNELS, cache_mask, choice
from jaxrft.models.attention.triton_decode import attend_triton_decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["cudnn", "triton"])
def test_values_and_gradients(kernel, dtype, head_dim, window):
    assert choice.probe(kernel, dtype, head_dim, window) is None


def test_long_packed_rows_go_to_triton():
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
