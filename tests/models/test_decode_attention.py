"""Attention of a generating engine's newest tokens to its caches, and what goes into these."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import parallel
from jaxrft.models import attention
from jaxrft.models.attention import attend_cached, cache_mask, choice, triton_decode
from jaxrft.models.attention.dense import attend_dense
from jaxrft.models.attention.triton_decode import (
    DecodeTile,
    attend_triton_decode,
    extend_triton_decode,
    usual_splits,
    usual_tile,
)
from jaxrft.models.layers import LayerCache
from jaxrft.rollout.buckets import KERNEL_BLOCK
from tests.jaxprs import count, equations
from tests.models.test_attention import reference


def random_slots(slots, heads, kv_heads, keys, head_dim, dtype=jnp.float32):
    """A query of each slot, its key and value, and caches."""
    rng = np.random.default_rng(0)
    shapes = (
        (slots, 1, heads, head_dim),
        *[(slots, kv_heads, 1, head_dim)] * 2,
        *[(slots, kv_heads, keys, head_dim)] * 2,
    )
    query, *others = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return query, tuple(others[:2]), tuple(others[2:])


def written(new, cache, positions):
    """Caches with the new token, by NumPy."""
    found = []
    for fresh, old in zip(new, cache):
        part = np.array(old)
        part[np.arange(len(part)), :, positions] = np.asarray(fresh)[:, :, 0]
        found.append(part)
    return found


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_newest_token_is_seen_and_goes_into_the_cache(splits, window):
    """Places at both ends of the blocks that the kernel takes, an empty cache and a full one."""
    query, new, cache = random_slots(7, 6, 2, 96, 16)
    positions = np.array([0, 1, 31, 32, 33, 64, 95])
    mask = cache_mask(jnp.asarray(positions), window)
    key, value = written(new, cache, positions)
    place = np.arange(96)
    seen = place[None] <= positions[:, None]
    if window is not None:
        seen &= positions[:, None] - place < window
    expected, _ = reference(*map(np.float64, (query, key, value, query)), seen[:, None])
    # What stands where the newest token goes, and behind it, is never looked at.
    unseen = (place[None] >= positions[:, None])[:, None, :, None]
    cache = tuple(jnp.where(unseen, 1e4, part) for part in cache)
    for extend in (
        functools.partial(extend_triton_decode, splits=splits),
        functools.partial(attend_cached, window=96),
    ):
        out, after = jax.jit(extend)(query, new, cache, mask)
        np.testing.assert_allclose(out, expected, atol=2e-6)
        for part, want in zip(after, written(new, cache, positions)):
            np.testing.assert_array_equal(part, want)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (14, 2), (20, 1)])
def test_any_number_of_heads_extends(heads, kv_heads):
    """A tile has 16 rows, or 32: of some queries, behind which others' and the new keys stand."""
    query, new, cache = random_slots(3, heads, kv_heads, 48, 16)
    mask = cache_mask(jnp.array([0, 20, 47]))
    expected, after = attend_cached(query, new, cache, mask, 48)
    out, caches = extend_triton_decode(query, new, cache, mask)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for part, want in zip(caches, after):
        np.testing.assert_array_equal(part, want)


def test_16_bits_go_into_the_cache_as_they_are():
    query, new, cache = random_slots(3, 4, 2, 48, 32, jnp.bfloat16)
    mask = cache_mask(jnp.array([0, 20, 47]))
    out, after = extend_triton_decode(query, new, cache, mask)
    expected, caches = attend_cached(query, new, cache, mask, 48)
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=0.02)
    for part, want in zip(after, caches):
        np.testing.assert_array_equal(np.float32(part), np.float32(want))


def test_one_kernel_writes_and_attends():
    """Nothing is scattered beside it, and the caches that it gives are those that it takes."""
    query, new, cache = random_slots(3, 4, 2, 48, 16)
    for kernel, scatters, kernels in (("dense", 2, 0), ("triton_decode", 0, 1)):
        mask = cache_mask(jnp.array([0, 20, 47]), kernel=kernel)
        trace = jax.make_jaxpr(functools.partial(attend_cached, window=48))(query, new, cache, mask)
        assert count(trace.jaxpr, "scatter") == scatters
        calls = [found for found, _ in equations(trace.jaxpr) if found.primitive.name == "pallas_call"]
        assert [call.params["input_output_aliases"] for call in calls] == [((1, 1), (2, 2))] * kernels


@pytest.mark.parametrize(("kernel", "keys"), [("dense", 64), ("triton_decode", 64), ("triton_decode", 40)])
def test_only_a_part_of_the_cache_is_looked_at(kernel, keys):
    """Also of a cache that the kernel could not take whole."""
    query, new, cache = random_slots(2, 4, 2, keys, 16)
    mask = cache_mask(jnp.array([3, 15]), kernel=kernel)
    expected, _ = attend_cached(query, new, cache, dataclasses.replace(mask, kernel="dense"), keys)
    cache = tuple(part.at[:, :, 16:].set(jnp.nan) for part in cache)
    out, after = attend_cached(query, new, cache, mask, 16)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert after[0].shape[2] == keys
    np.testing.assert_array_equal(after[0][1, :, 15], new[0][1, :, 0])


def test_on_meshes(run_python):
    run_python(f"from {__name__} import check_meshes; check_meshes()", devices=8)


def check_meshes():
    """Slots and heads on several devices; where there are fewer key heads than devices these are repeated.

    The kernel is not interpreted inside ``shard_map``: whole scores stand for it.
    """

    def extend(query, new, cache, mask):
        assert (query.shape[0], query.shape[2] * kv_heads) == (8 // rows, cache[0].shape[1] * heads)
        ran.append(1)
        cache = attention._written(new, cache, mask)
        return attend_dense(query, *cache, mask), cache

    attention._extend_locally, attention.KERNELS["triton_decode"] = extend, attend_dense
    for sizes, heads, kv_heads in (
        ((2, 2, 1, 2), 4, 2),
        ((1, 2, 1, 4), 4, 2),
        ((8, 1, 1, 1), 6, 3),
        ((1, 1, 1, 8), 8, 1),
    ):
        query, *parts = random_slots(8, heads, kv_heads, 48, 16)
        new, cache = (LayerCache(*part) for part in parts)
        positions = jnp.array([0, 1, 15, 16, 17, 31, 32, 47])
        expected, caches = attend_cached(query, new, cache, cache_mask(positions), 48)
        layout, ran, rows = parallel.Layout(parallel.make_mesh(*sizes), decoding=True), [], sizes[0] * sizes[1]
        mask = cache_mask(positions, kernel="triton_decode")
        with layout.use():
            out, after = jax.jit(functools.partial(attend_cached, window=48))(query, new, cache, mask)
        assert bool(ran) == (kv_heads % sizes[3] == 0)
        np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=str(sizes))
        for part, want in zip(after, caches):
            np.testing.assert_array_equal(part, want)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="a mesh of CPUs names no GPU to translate Triton's kernels for"
)
def test_on_a_mesh_each_device_has_a_triton_program_that_changes_its_cache(run_python):
    run_python(f"from {__name__} import check_program; check_program()", devices=4)


def check_program():
    layout = parallel.Layout(parallel.make_mesh(1, 2, 1, 2), decoding=True)
    lengths = ((4, 1, 4, 64), *[(4, 2, 1, 64)] * 2, *[(4, 2, 48, 64)] * 2)
    query, *parts = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in lengths)

    def run(query, new, cache, positions):
        return attend_cached(query, new, cache, cache_mask(positions, kernel="triton_decode"), 48)

    target = "__gpu$xla.gpu.triton"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    with layout.use(), mock.patch.object(jax, "default_backend", return_value="gpu"):
        export = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=allowed)
        text = export(query, tuple(parts[:2]), tuple(parts[2:]), jax.ShapeDtypeStruct((4,), jnp.int32)).mlir_module()
    [call] = [line for line in text.splitlines() if f"@{target}" in line]
    # Two of the slots, and one of the key heads with its two query heads.
    assert "tensor<2x4x64xbf16>, tensor<2x1x48x64xbf16>, tensor<2x1x48x64xbf16>" in call
    assert call.count("output_operand_alias<") == 2


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_reads_what_each_slot_has(splits, window):
    rng = np.random.default_rng(0)
    slots, heads, kv_heads, keys, head_dim = 5, 6, 2, 96, 16
    shapes = ((slots, 1, heads, head_dim), *[(slots, kv_heads, keys, head_dim)] * 2)
    query, key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    positions = np.array([0, 1, 47, 63, 95], np.int32)
    place = np.arange(keys)
    behind = place[None] > positions[:, None]
    key = jnp.where(behind[:, None, :, None], 1e4, key)
    mask = cache_mask(jnp.asarray(positions), window)
    seen = (~behind if window is None else ~behind & (positions[:, None] - place < window))[:, None]
    expected, _ = reference(*map(np.float64, (query, key, value, query)), seen)
    for kernel in (attend_dense, functools.partial(attend_triton_decode, splits=splits)):
        np.testing.assert_allclose(jax.jit(kernel)(query, key, value, mask), expected, atol=2e-6)


def test_keys_are_split_where_they_are_many_and_heads_few():
    heads_and_keys = [(1, 384), (2, 512), (2, 640), (32, 4096), (128, 4096), (512, 512), (1024, 4096)]
    assert [usual_splits(*case) for case in heads_and_keys] == [1, 4, 5, 16, 4, 1, 1]


def test_steps_are_large_where_all_instances_fit():
    assert [usual_tile(count, 128).step for count in (1, 264, 265, 512)] == [64, 64, 32, 32]


@pytest.mark.parametrize("head_dim", choice.TRITON_HEAD_DIMS)
def test_caches_of_an_engine_are_whole_blocks_of_any_step(head_dim):
    """A cache that the step does not divide would be read in smaller ones."""
    assert all(KERNEL_BLOCK % usual_tile(count, head_dim).step == 0 for count in (1, 1000))


@pytest.mark.parametrize("tile", [DecodeTile(16, 2, 3), DecodeTile(64, 4, 2), DecodeTile(128, 4, 2)])
def test_how_the_decode_kernel_is_cut_changes_nothing(tile):
    """Also where a cache is no multiple of the keys that the tile takes at a time."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 1, 4, 16), *[(3, 2, 96, 16)] * 2)
    )
    mask = cache_mask(jnp.array([0, 50, 95]))
    expected = attend_dense(query, key, value, mask)
    for splits in (None, 2):
        found = attend_triton_decode(query, key, value, mask, splits=splits, tile=tile)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_step_is_a_power_of_two():
    query, new, cache = random_slots(1, 2, 2, 96, 16)
    with pytest.raises(ValueError, match="got a step of 48 keys, takes a power of two"):
        extend_triton_decode(query, new, cache, cache_mask(jnp.array([3])), tile=DecodeTile(48, 4, 2))


def test_decoding_refuses_a_cache_that_is_no_multiple_of_16():
    arrays = (jnp.zeros((1, 1, 2, 16)), jnp.zeros((1, 2, 24, 16)), jnp.zeros((1, 2, 24, 16)))
    with pytest.raises(ValueError, match="24 cached tokens, takes a multiple of 16"):
        attend_triton_decode(*arrays, cache_mask(jnp.zeros((1,), jnp.int32)))


def test_the_decode_kernel_is_tried_before_it_is_taken(monkeypatch):
    """Interpreted, it is right; one that sees what is behind a slot's newest token is found out."""
    arguments = ("triton_decode", "float32", 16)

    def sees_all(query, key, value, mask):
        return attend_dense(query, key, value, cache_mask(jnp.full(query.shape[:1], key.shape[2] - 1)))

    for kernel, expected in ((attention.KERNELS["triton_decode"], None), (sees_all, "gives wrong values here")):
        monkeypatch.setitem(attention.KERNELS, "triton_decode", kernel)
        choice.probe.cache_clear()
        found = []
        jax.jit(lambda x, found=found: found.append(choice.probe(*arguments)) or x)(1.0)
        assert (found[0] is None) if expected is None else (expected in found[0])
    choice.probe.cache_clear()


@pytest.mark.parametrize("wrong", [1, 4])
def test_it_is_tried_with_and_without_splits(monkeypatch, wrong):
    """Which are two programs: one that is wrong is found out, whichever it is."""
    run = triton_decode._run

    def run_wrongly(*arguments):
        found = run(*arguments)
        return [found[0] * (2 if arguments[5] == wrong else 1), *found[1:]]

    monkeypatch.setattr(triton_decode, "_run", run_wrongly)
    choice.probe.cache_clear()
    assert "gives wrong values" in choice.probe("triton_decode", "float32", 16)
    choice.probe.cache_clear()


def test_a_kernel_that_writes_elsewhere_is_not_taken(monkeypatch):
    """Into the place before, or nothing at all."""

    def before(query, new, cache, mask):
        out, _ = extend_triton_decode(query, new, cache, mask)
        return out, extend_triton_decode(query, new, cache, dataclasses.replace(mask, last=mask.last - 1))[1]

    def nowhere(query, new, cache, mask):
        return extend_triton_decode(query, new, cache, mask)[0], cache

    for kernel, expected in (
        (extend_triton_decode, None),
        (before, "keys of the cache"),
        (nowhere, "keys of the cache"),
    ):
        monkeypatch.setattr(attention, "_extend_locally", kernel)
        choice.probe.cache_clear()
        found = choice.probe("triton_decode", "float32", 16)
        assert (found is None) if expected is None else (expected in found)
    choice.probe.cache_clear()
