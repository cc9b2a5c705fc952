"""Every implementation of attention against whole scores in NumPy, in values and gradients, for every mask."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrft import parallel
from jaxrft.models import attention
from jaxrft.models.attention import AttentionMask, attend, cache_mask, causal_mask, choice
from jaxrft.models.attention.chunked import attend_chunked
from jaxrft.models.attention.cudnn import attend_cudnn
from jaxrft.models.attention.dense import attend_dense
from jaxrft.models.attention.mask import padded_mask, whole_blocks_of_keys, whole_blocks_of_queries
from jaxrft.models.attention.triton import USUAL, Tile, Tiles, attend_triton
from jaxrft.models.attention.triton_decode import attend_triton_decode, extend_triton_decode


def tiles(*own_and_step):
    return Tiles(*(Tile(own, step, warps=4, stages=2) for own, step in own_and_step))


# Blocks that divide none of the lengths below, and some that are longer than all.
KERNELS = {
    "dense": attend_dense,
    "chunked": functools.partial(attend_chunked, blocks=(16, 24)),
    "one block": functools.partial(attend_chunked, blocks=(512, 512)),
    "triton": functools.partial(attend_triton, tiles=tiles((32, 16), (16, 32), (32, 16)), interpret=True),
    "triton, other tiles": functools.partial(attend_triton, tiles=tiles((16, 32), (64, 16), (16, 64)), interpret=True),
}
# batch, time, heads, key heads, head size, sliding window, segments of a row
CASES = {
    "causal": (2, 50, 4, 2, 16, None, 1),
    "one token": (1, 1, 2, 2, 16, None, 1),
    "window": (3, 64, 4, 1, 16, 7, 1),
    "packed": (2, 77, 6, 3, 16, None, 5),
    "packed, window": (2, 77, 3, 3, 32, 9, 4),
    "a segment a token": (1, 33, 2, 1, 16, None, 33),
    # Longer than several blocks: most are seen whole, and are added without a mask.
    "long, causal": (1, 150, 6, 1, 16, None, 1),
    "long, window": (1, 150, 6, 2, 16, 100, 1),
    "long, packed": (2, 150, 6, 2, 16, None, 2),
    "long, packed, window": (2, 150, 4, 1, 16, 70, 2),
}


def random_segments(rng, batch, time, segments):
    """Lengths differ from row to row; what stands behind the last segment has number 0, as in a packed row."""
    ids = np.sort(rng.integers(1, segments + 1, (batch, time)), axis=1) if segments < time else np.arange(1, time + 1)
    ids = np.broadcast_to(ids, (batch, time)).copy()
    if segments < time:
        ids[:, time - time // 8 :] = 0
    return ids.astype(np.int32)


def reference(query, key, value, weight, seen):
    """Plain float64: softmax(q k / sqrt(d)) over the keys that are seen, head by head; and its gradients.

    They are those of the sum of the result times ``weight``, by the closed form of softmax's derivative.
    """
    group, scale = query.shape[2] // key.shape[1], 1 / np.sqrt(query.shape[-1])
    out, grads = np.zeros(query.shape), [np.zeros(array.shape) for array in (query, key, value)]
    for head in range(query.shape[2]):
        q, k, v, g = query[:, :, head], key[:, head // group], value[:, head // group], weight[:, :, head]
        scores = np.where(seen, np.einsum("btd,bkd->btk", q, k) * scale, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[:, :, head] = np.einsum("btk,bkd->btd", p, v)
        of_p = np.einsum("btd,bkd->btk", g, v)
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdims=True)) * scale
        grads[0][:, :, head] = np.einsum("btk,bkd->btd", of_scores, k)
        grads[1][:, head // group] += np.einsum("btk,btd->bkd", of_scores, q)
        grads[2][:, head // group] += np.einsum("btk,btd->bkd", p, g)
    return out, grads


def make_case(name, dtype=np.float32):
    batch, time, heads, kv_heads, head_dim, window, segments = CASES[name]
    rng = np.random.default_rng(len(name))
    shapes = [(batch, time, heads, head_dim), *[(batch, kv_heads, time, head_dim)] * 2, (batch, time, heads, head_dim)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segment_ids = random_segments(rng, batch, time, segments) if segments > 1 else None
    place = np.arange(time)
    seen = (place[None, :] <= place[:, None])[None]
    if window is not None:
        seen = seen & (place[:, None] - place[None, :] < window)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return arrays, causal_mask(time, window, segment_ids), np.broadcast_to(seen, (batch, time, time))


def gradients(kernel, arrays, mask):
    *inputs, weight = arrays
    return jax.jit(jax.grad(lambda *a: jnp.sum(kernel(*a, mask) * weight), argnums=(0, 1, 2)))(*inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(kernel, case):
    arrays, mask, seen = make_case(case)
    *inputs, _ = arrays
    np.testing.assert_array_equal(np.broadcast_to(mask.visible(np.arange(seen.shape[2])), seen.shape), seen)
    out = jax.jit(KERNELS[kernel])(*inputs, mask)
    expected, expected_gradients = reference(*map(np.float64, arrays), seen)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, want in zip(gradients(KERNELS[kernel], arrays, mask), expected_gradients):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=6e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_what_cudnn_is_asked_for(monkeypatch, window):
    """The same call answered by XLA, whose masks are of the same meaning: lengths, the causal side, a left window."""
    arrays, _, _ = make_case("window")
    *inputs, weight = arrays
    time = inputs[0].shape[1]
    lengths = jnp.array([time, 40, 1])
    weight = jnp.where((jnp.arange(time) < lengths[:, None])[..., None, None], weight, 0.0)
    asked, public = [], jax.nn.dot_product_attention

    def by_xla(*arguments, implementation, **options):
        asked.append(implementation)
        return public(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    mask = causal_mask(time, window, lengths=lengths)
    got, expected = (gradients(kernel, [*inputs, weight], mask) for kernel in (attend_cudnn, attend_dense))
    assert set(asked) == {"cudnn"}
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=5e-6)
    out, dense = (jnp.where(weight == 0, 0.0, kernel(*inputs, mask)) for kernel in (attend_cudnn, attend_dense))
    np.testing.assert_allclose(out, dense, atol=2e-6)


@pytest.mark.parametrize("case", ["packed", "long, packed"])
@pytest.mark.parametrize("kernel", ["chunked", "triton", "triton, other tiles"])
def test_nothing_leaks_between_segments(kernel, case):
    """Another segment's numbers change neither values nor gradients: not even in the last bit."""
    arrays, mask, _ = make_case(case)
    *inputs, weight = arrays
    # A segment in the middle of the row: others stand before and behind it.
    first = np.asarray(mask.first[0])
    own = first == first[first.size // 2]
    changed = [jnp.where(own[:, None, None] if a.shape[1] == own.size else own[:, None], a, 9.0) for a in inputs]
    weight = weight * own[:, None, None]
    results = (gradients(KERNELS[kernel], [*some, weight], mask) for some in (inputs, changed))
    for a, b in zip(*results):
        rows = a[0][own] if a.shape[1] == own.size else a[0][:, own]
        others = b[0][own] if b.shape[1] == own.size else b[0][:, own]
        np.testing.assert_array_equal(rows, others)


@pytest.mark.parametrize("case", ["long, packed", "long, causal"])
@pytest.mark.parametrize(("query_block", "key_block"), [(16, 16), (32, 16), (16, 32)])
def test_blocks_that_are_seen_whole(query_block, key_block, case):
    """Those between the middle two numbers, which no mask is applied to, and the others are what the mask says."""
    _, mask, _ = make_case(case)
    mask, keys = padded_mask(mask, 64), 192
    seen = np.asarray(mask.visible(jnp.arange(keys)))
    blocks = seen.reshape(len(seen), -1, query_block, keys // key_block, key_block).swapaxes(2, 3)
    seen, seen_whole = blocks.any((3, 4)), blocks.all((3, 4))
    of_keys = whole_blocks_of_keys(mask, query_block, key_block)
    of_queries = whole_blocks_of_queries(mask, query_block, key_block, keys)
    assert seen_whole.any()
    turned = (of_queries, seen.swapaxes(1, 2), seen_whole.swapaxes(1, 2))
    for bounds, some, every in ((of_keys, seen, seen_whole), turned):
        number = np.arange(some.shape[2])
        low, whole, rest, high = np.moveaxis(np.asarray(bounds), -1, 0)[..., None]
        np.testing.assert_array_equal((low <= number) & (number < high), some)
        np.testing.assert_array_equal((whole <= number) & (number < rest), every)
        assert ((low <= whole) & (whole <= rest) & (rest <= high)).all()


@pytest.mark.parametrize("kernel", ["chunked", "triton"])
def test_bfloat16_is_as_exact_as_whole_scores(kernel):
    arrays, mask, _ = make_case("packed", jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in arrays]
    runs = ((KERNELS[kernel], arrays), (attend_dense, arrays), (attend_dense, exact))
    for got, dense, want in zip(*(gradients(function, inputs, mask) for function, inputs in runs)):
        error, usual = (np.abs(np.float32(a) - np.float32(want)).max() for a in (got, dense))
        assert error <= 2 * usual + 1e-3


def test_memory_grows_with_the_length_not_its_square():
    """What the compiled gradient holds beside its arguments and results: four times as long, four times as much."""

    def held(kernel, time):
        shapes = [(1, time, 2, 16), *[(1, 2, time, 16)] * 2, (1, time, 2, 16)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        *inputs, weight = arrays
        step = jax.jit(jax.grad(lambda q, k, v, w: jnp.sum(kernel(q, k, v, causal_mask(time)) * w), argnums=(0, 1, 2)))
        return step.lower(*inputs, weight).compile().memory_analysis().temp_size_in_bytes

    chunked = functools.partial(attend_chunked, blocks=(64, 64))
    assert held(chunked, 4096) < 5 * held(chunked, 1024)
    assert held(attend_dense, 4096) > 10 * held(attend_dense, 1024)


def an_h100():
    """What programs are made for; from JAX 0.11 on Pallas asks."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("function", ["forward", "gradient", "decode", "extend"])
def test_the_kernels_become_triton_programs(function):
    """No GPU is needed to translate them. Whether Triton's compiler takes them is for the tests on a GPU."""
    arrays = [(2, 300, 8, 128), (2, 2, 300, 128), (2, 2, 300, 128)]
    calls, mask = {"gradient": 3}.get(function, 1), causal_mask(300, 40)

    def run(*inputs):
        return attend_triton(*inputs, mask, interpret=False).astype(jnp.float32).sum()

    program = {"forward": run, "gradient": jax.grad(run, argnums=(0, 1, 2))}.get(function)
    if program is None:
        arrays = [(2, 1, 8, 128), (2, 2, 304, 128), (2, 2, 304, 128)]
        mask = cache_mask(jnp.array([3, 303]))
        program = lambda *inputs: attend_triton_decode(*inputs, mask, interpret=False)  # noqa: E731
    if function == "extend":
        arrays += [(2, 2, 1, 128)] * 2
        program = lambda q, k, v, *new: extend_triton_decode(q, new, (k, v), mask, interpret=False)  # noqa: E731
    target = "__gpu$xla.gpu.triton"
    with an_h100():
        exported = jax.export.export(
            jax.jit(program),
            platforms=["cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
        )(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arrays))
    assert exported.mlir_module().count(f"@{target}") == calls


def test_every_head_size_has_usual_tiles():
    assert tuple(USUAL) == choice.TRITON_HEAD_DIMS
    for found in USUAL.values():
        assert all(tile.own % 16 == tile.step % 16 == 0 for tile in found)


# ---------------------------------------------------------------------------------------------- the choice

GPU = choice.Use(platform="gpu", dtype="bfloat16", head_dim=128, keys=4096)


@pytest.fixture
def working_kernels(monkeypatch):
    """As on a GPU on which all kernels work."""
    monkeypatch.setattr(choice, "probe", lambda *arguments: None)
    for function in (choice.choose, choice.choose_decode):
        function.cache_clear()
    yield
    for function in (choice.choose, choice.choose_decode):
        function.cache_clear()


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "cudnn"),
        ({"window": 512}, "cudnn"),
        ({"packed": True}, "triton"),
        ({"shares_time": True}, "triton"),
        ({"mixed": True}, "triton"),
        ({"packed": True, "head_dim": 80}, "cudnn"),
        ({"packed": True, "head_dim": 80, "mixed": True}, "chunked"),
        ({"packed": True, "head_dim": 80, "mixed": True, "keys": 1024}, "dense"),
        ({"dtype": "float32"}, "chunked"),
        ({"dtype": "float32", "keys": 64}, "dense"),
        ({"platform": "cpu", "dtype": "float32", "keys": 448}, "dense"),
        ({"platform": "cpu", "keys": 449}, "chunked"),
    ],
)
@pytest.mark.usefixtures("working_kernels")
def test_choice(changes, kernel):
    assert choice.choose("auto", dataclasses.replace(GPU, **changes)) == kernel


def test_tritons_kernels_have_tiles_for_what_they_are_chosen_for():
    assert set(USUAL) == set(choice.TRITON_HEAD_DIMS)


@pytest.mark.usefixtures("working_kernels")
def test_decoding_is_by_triton_where_it_can():
    for wanted, changes, kernel in (
        ("triton", {}, "triton_decode"), ("auto", {}, "triton_decode"), ("auto", {"keys": 24}, "dense"),
        ("auto", {"dtype": "float32"}, "dense"), ("auto", {"platform": "cpu"}, "dense"), ("cudnn", {}, "dense"),
    ):  # fmt: skip
        assert choice.choose_decode(wanted, dataclasses.replace(GPU, **changes)) == kernel


@pytest.mark.parametrize(
    ("wanted", "changes", "message"),
    [
        ("flash", {}, "got 'flash', takes auto, dense, chunked, cudnn, triton"),
        ("cudnn", {"platform": "cpu"}, "'cudnn', which needs an NVIDIA GPU; takes auto, dense or chunked"),
        ("cudnn", {"packed": True, "shares_time": True}, "several devices share"),
        ("cudnn", {"shares_time": True}, "several devices share"),
        ("cudnn", {"mixed": True}, "different windows"),
        ("triton", {"dtype": "float32"}, "takes bfloat16 and float16, not float32"),
        ("triton", {"head_dim": 80}, "not 80"),
    ],
)
@pytest.mark.usefixtures("working_kernels")
def test_what_is_asked_for_and_cannot_be_is_refused(wanted, changes, message):
    with pytest.raises(ValueError, match=message):
        choice.choose(wanted, dataclasses.replace(GPU, **changes))


def test_a_choice_is_logged_once(working_kernels, caplog):
    with caplog.at_level("INFO", logger=choice.__name__):
        for _ in range(3):
            choice.choose("auto", dataclasses.replace(GPU, head_dim=80, packed=True, mixed=True))
    assert [r.getMessage().split(" for ")[0] for r in caplog.records] == ["attention: chunked"]
    assert "triton takes heads of 16, 32, 64, 128, 256 channels, not 80; cudnn does" in caplog.records[0].getMessage()


def test_what_is_asked_for_is_logged_once(working_kernels, caplog):
    with caplog.at_level("INFO", logger=choice.__name__):
        for _ in range(3):
            assert choice.choose("triton", GPU) == "triton"
    assert [r.getMessage().split(" for ")[0] for r in caplog.records] == ["attention: triton"]
    assert caplog.records[0].getMessage().endswith("as the configuration asks")


def test_the_choice_for_decoding_is_logged_once_with_its_reason(working_kernels, monkeypatch, caplog):
    monkeypatch.setattr(choice, "probe", lambda kernel, *_: "gives wrong values here" if "decode" in kernel else None)
    with caplog.at_level("INFO", logger=choice.__name__):
        for keys in (32, 24, 32):
            assert choice.choose_decode("auto", dataclasses.replace(GPU, keys=keys)) == "dense"
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" for ")[0] for line in said] == ["attention while decoding: dense"] * 2
    assert said[0].endswith("; triton_decode gives wrong values here")
    assert said[1].endswith("; triton_decode takes caches of a multiple of 16 places, not 24")


def test_a_kernel_that_is_wrong_here_is_not_taken(monkeypatch):
    """Leaking across segments, raising, or right: as the probe finds. Last is the kernel itself, interpreted."""
    arguments, kernel_itself = ("triton", "float32", 16, None, True), attention.KERNELS["triton"]

    def leaks(query, key, value, mask):
        return attend_dense(query, key, value, dataclasses.replace(mask, first=jnp.zeros_like(mask.first)))

    def raises(*arguments):
        raise NotImplementedError("no such GPU")

    for kernel, expected in ((leaks, "gives wrong values here"), (raises, "no such GPU"), (kernel_itself, None)):
        monkeypatch.setitem(attention.KERNELS, "triton", kernel)
        choice.probe.cache_clear()
        # As where it is asked: while a program is traced.
        jax.jit(lambda x: found.append(choice.probe(*arguments)) or x)(1.0) if (found := []) == [] else None
        assert (found[0] is None) if expected is None else (expected in found[0])
    choice.probe.cache_clear()


# ---------------------------------------------------------------------------------------------- on meshes


def test_sharded(run_python):
    run_python(f"from {__name__} import check_sharded; check_sharded()", devices=8)


def check_sharded():
    """Rows, heads and time steps on eight devices: values and gradients are those of one."""
    rng = np.random.default_rng(0)
    shapes = [(4, 48, 4, 16), (4, 2, 48, 16), (4, 2, 48, 16), (4, 48, 4, 16)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    segments = jnp.asarray(random_segments(rng, 4, 48, 3))
    for sizes in ((2, 1, 2, 2), (1, 4, 2, 1), (1, 1, 8, 1), (1, 2, 1, 4)):
        layout = parallel.Layout(parallel.make_mesh(*sizes), "zero3")
        for mask in (causal_mask(48, 20), causal_mask(48, None, segments)):
            expected = gradients(attend_dense, arrays, mask)
            for name in ("dense", "chunked"):
                with layout.use():
                    got = gradients(attend, arrays, dataclasses.replace(mask, kernel=name))
                for a, b in zip(got, expected):
                    np.testing.assert_allclose(a, b, atol=5e-6, err_msg=f"{sizes} {name}")


def test_a_mask_of_rows_is_a_pytree_that_is_cut_like_them():
    mask = causal_mask(4, None, np.array([[1, 1, 2, 2]]), kernel="chunked")
    assert isinstance(jax.tree.map(lambda a: PartitionSpec(), mask), AttentionMask)
    assert jax.tree.structure(mask) != jax.tree.structure(dataclasses.replace(mask, kernel="dense"))
