"""cuDNN's packed rows: JAX's own interface, in which a CPU answers for cuDNN, and the program that it becomes."""

import dataclasses
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as interface

from jaxrft import parallel
from jaxrft.models.attention import attend, causal_mask, choice, cudnn_packed, probing
from jaxrft.models.attention.chunked import attend_chunked
from jaxrft.models.attention.cudnn import attend_cudnn
from jaxrft.models.attention.dense import attend_dense
from jaxrft.models.attention.mask import segments

# Tokens of each segment, row by row; all rows together have 96.
ROWS = {
    "ragged": [(1, 40, 7, 48), (96,), (33, 63)],
    "one segment": [(96,)],
    "single tokens": [(1,) * 7 + (89,), (90, 1, 1, 1, 1, 1, 1)],
    "padding": [(30, 20, -46), (95, -1), (-96,)],
    "as many as there may be": [(12,) * 8, (5,) * 7 + (61,)],
    "more than there may be": [(8,) * 12, (96,)],
}


def segment_ids(rows):
    """0 for the tokens of a negative number, which are padding."""
    return np.stack([np.repeat([i * (n > 0) for i, n in enumerate(row, 1)], np.abs(row)) for row in rows])


def by_cudnn(query, key, value, lengths, q_offsets, kv_offsets, scale, window):
    """What cuDNN does with the lists that JAX makes for it, sequence by sequence, in flat memory.

    A list's offsets are numbers of elements from the start of the memory, to which tokens, heads and channels are added
    by their strides. What belongs to no sequence is never written.
    """
    (_, time, heads, channels), kv_heads = query.shape, key.shape[2]
    tokens = jnp.arange(time)

    def places(offset, length, heads):
        rows = offset + tokens[:, None, None] * heads * channels
        rows = rows + jnp.arange(heads)[:, None] * channels + jnp.arange(channels)
        return jnp.where((tokens < length)[:, None, None], rows, query.size)

    def one(q_offset, kv_offset, length):
        own, others = places(q_offset, length, heads), places(kv_offset, length, kv_heads)
        reads = ((query, own), (key, others), (value, others))
        q, k, v = (a.ravel().at[i].get(mode="fill", fill_value=0).astype(jnp.float32) for a, i in reads)
        k, v = (jnp.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
        seen = (tokens[:, None] >= tokens) & (tokens[:, None] - tokens < (window or time)) & (tokens < length)
        weights = jax.nn.softmax(jnp.where(seen, scale * jnp.einsum("qhd,khd->hqk", q, k), -1e30), axis=-1)
        return own, jnp.einsum("hqk,khd->qhd", weights, v)

    count = lengths.size
    own, out = jax.vmap(one)(q_offsets.ravel()[:count], kv_offsets.ravel()[:count], lengths.ravel())
    return (
        jnp.full(query.size, jnp.nan, jnp.float32)
        .at[own]
        .set(out, mode="drop")
        .reshape(query.shape)
        .astype(query.dtype)
    )


def answer_for_cudnn(monkeypatch):
    """As on a GPU that has cuDNN; what it is asked for."""
    calls = []
    names = list(inspect.signature(interface._dot_product_attention).parameters)

    def answer(*arguments):
        given = dict(zip(names, arguments))
        query, key = given["query"], given["key"]
        lists = [given[name] for name in ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")]
        lengths, _, q_offsets, kv_offsets = interface._fix_seqlen_offsets(*lists, query, key)
        calls.append(given | {"key heads": key.shape[2]})
        options = (given["scale"], given["sliding_window_length"])
        return by_cudnn(query, key, given["value"], lengths, q_offsets, kv_offsets, *options)

    as_on_hopper(monkeypatch)
    # It refuses float32.
    monkeypatch.setattr(interface, "check_layout", lambda *arguments: None)
    monkeypatch.setattr(interface, "_dot_product_attention", answer)
    return calls


@pytest.fixture
def asked(monkeypatch):
    probing.probe.cache_clear()
    yield answer_for_cudnn(monkeypatch)
    probing.probe.cache_clear()


def as_on_hopper(monkeypatch):
    monkeypatch.setattr(interface, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(interface, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(interface, "is_cuda_compute_capability_equal", lambda capability: False)


def make_case(name, heads=(4, 2), window=None):
    rows = ROWS[name]
    ids, rng = segment_ids(rows), np.random.default_rng(0)
    shapes = [(len(rows), 96, heads[0], 16), *[(len(rows), heads[1], 96, 16)] * 2]
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weight = jnp.asarray(rng.normal(size=shapes[0]) * (ids > 0)[..., None, None], jnp.float32)
    return inputs, weight, causal_mask(96, window, jnp.asarray(ids, jnp.int32))


def results(kernel, inputs, weight, mask):
    """Values and the gradients of queries, keys and values."""

    def loss(*inputs):
        out = kernel(*inputs, mask)
        return jnp.sum(out * weight), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


@pytest.mark.parametrize(
    ("name", "heads", "window"),
    [
        *((name, (4, 2), None) for name in ROWS),
        ("ragged", (4, 4), None),
        ("ragged", (6, 1), 9),
        ("padding", (2, 1), 9),
        ("padding", (2, 2), 1),
    ],
)
def test_values_and_gradients(asked, name, heads, window):
    inputs, weight, mask = make_case(name, heads, window)
    got, expected = (results(kernel, inputs, weight, mask) for kernel in (attend_cudnn, attend_dense))
    # Padding too: what is not written would be NaN.
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=5e-6)
    padding = np.asarray(weight[..., 0, 0] == 0)
    for gradient in got[2:]:
        assert not np.any(np.swapaxes(gradient, 1, 2)[padding])
    assert {call["mask_type"] for call in asked} == {interface.MaskType.PADDING_CAUSAL}
    assert {call["sliding_window_length"] for call in asked} == {window}


@pytest.mark.parametrize("window", [None, 9])
def test_nothing_leaks_between_segments(asked, window):
    """Of what cuDNN is told to read and to write: other segments' numbers change neither values nor gradients."""
    inputs, weight, mask = make_case("ragged", window=window)
    # The third segment of the first row, between two others.
    own = np.zeros((3, 96), bool)
    own[0, 41:48] = True
    by_time = [own[..., None, None], *[own[:, None, :, None]] * 2]
    changed = [jnp.where(kept, array, 9.0) for kept, array in zip(by_time, inputs)]
    weight = weight * own[..., None, None]
    before, after = (results(attend_cudnn, some, weight, mask) for some in (inputs, changed))
    for kept, a, b in zip([by_time[0], *by_time], before, after):
        np.testing.assert_array_equal(jnp.where(kept, a, 0.0), jnp.where(kept, b, 0.0))
    assert len(asked) >= 2


def test_segments():
    mask = causal_mask(6, None, np.array([[3, 3, 1, 1, 1, 0], [2, 2, 2, 2, 2, 2]]))
    starts, lengths, fits = segments(mask, 4)
    np.testing.assert_array_equal(starts, [[0, 2, 5, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, 3, 1, -1], [6, -1, -1, -1]])
    assert fits
    starts, lengths, fits = segments(mask, 2)
    np.testing.assert_array_equal(lengths, [[2, 3], [6, -1]])
    assert not fits


@pytest.mark.parametrize(("name", "fused"), [("as many as there may be", True), ("more than there may be", False)])
def test_rows_of_more_segments_than_the_program_takes_are_computed_in_blocks(asked, monkeypatch, name, fused):
    ran = []

    def told(*arguments):
        jax.debug.callback(lambda: ran.append("blocks"))
        return attend_chunked(*arguments)

    monkeypatch.setattr(cudnn_packed, "attend_chunked", told)
    inputs, _, mask = make_case(name)
    jax.block_until_ready(jax.jit(lambda *inputs: attend_cudnn(*inputs, mask))(*inputs))
    jax.effects_barrier()
    assert ran == ([] if fused else ["blocks"])


@pytest.mark.parametrize(
    ("time", "head_dim", "most"), [(192, 128, 8), (1024, 64, 16), (4096, 128, 64), (65536, 64, 32)]
)
def test_statistics_take_no_more_memory_than_the_result(time, head_dim, most):
    assert cudnn_packed.most_segments(time, head_dim) == most
    assert most == 8 or 4 * most <= 2 * head_dim


def test_more_numbers_than_places_count_are_refused():
    shapes = [(1, 2**20, 32, 128), *[(1, 8, 2**20, 128)] * 2]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, 2**20), jnp.int32)
    with pytest.raises(ValueError, match=r"2\*\*31 - 1 numbers together, got 4294967296"):
        jax.eval_shape(lambda q, k, v, ids: attend_cudnn(q, k, v, causal_mask(2**20, None, ids)), *inputs, ids)


# ---------------------------------------------------------------------------------------------- whether it is taken

USE = choice.Use(platform="gpu", dtype="float16", head_dim=16, keys=4096, packed=True)


@pytest.mark.usefixtures("asked")
def test_it_is_taken_where_it_is_right():
    assert choice.refusal("cudnn", USE) is None
    assert choice.refusal("cudnn", dataclasses.replace(USE, window=7)) is None


@pytest.mark.usefixtures("asked")
def test_places_that_are_counted_wrongly_are_refused(monkeypatch):
    """As JAX counts those of keys that have fewer heads than queries, up to a version."""

    def wrongly(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key, right=interface._fix_seqlen_offsets):
        *lists, _ = right(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key)
        return *lists, right(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, query)[3] * 2

    monkeypatch.setattr(interface, "_fix_seqlen_offsets", wrongly)
    assert "gives wrong values here" in choice.refusal("cudnn", USE)


def test_keys_of_fewer_heads_are_repeated_where_jax_needs_it(asked):
    inputs, _, mask = make_case("ragged")
    jax.eval_shape(lambda *inputs: attend_cudnn(*inputs, mask), *inputs)
    assert {call["key heads"] for call in asked} == {4 if jax.__version_info__ < (0, 11, 2) else 2}


def test_an_older_gpu_is_refused(asked, monkeypatch):
    def refused(*arguments):
        raise NotImplementedError("Packed layout requires a GPU with at least Hopper architecture.")

    monkeypatch.setattr(interface, "_dot_product_attention", refused)
    assert "at least Hopper" in choice.refusal("cudnn", USE)
    assert asked == []


@pytest.mark.parametrize("change", ["gone", "renamed"])
def test_another_jax_is_refused(monkeypatch, change):
    if change == "gone":
        monkeypatch.delattr(interface, "dot_product_attention")
    else:
        monkeypatch.setattr(interface, "dot_product_attention", lambda query, key, value, **options: None)
    reason = choice.refusal("cudnn", USE)
    assert reason.startswith(f"does not take packed rows with JAX {jax.__version__}, ")
    # Rows of one segment go by the public function.
    assert "lacks" not in (choice.refusal("cudnn", dataclasses.replace(USE, packed=False, here=False)) or "")


# ---------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("window", [None, 40])
def test_the_program_for_a_gpu(monkeypatch, window):
    """The two calls of cuDNN in it, with what they are told. No GPU is needed to make it."""
    as_on_hopper(monkeypatch)
    time, most = 600, 9
    shapes = [(2, time, 4, 64), *[(2, 2, time, 64)] * 2]

    def loss(q, k, v, ids):
        return attend_cudnn(q, k, v, causal_mask(time, window, ids)).astype(jnp.float32).sum()

    targets = [interface.get_custom_call_name(False, False, backward) for backward in (False, True)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target) for target in targets],
    )(*arguments, jax.ShapeDtypeStruct((2, time), jnp.int32)).mlir_module()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert [re.search(r"@(\S+?)\(", line)[1] for line in calls] == targets
    for line in calls:
        told = json.loads(re.search(r'backend_config = "(.*?)", ', line)[1].replace("\\22", '"'))
        told = told["cudnn_fmha_backend_config"]
        assert told["mask_type"] == "PADDING_CAUSAL"
        assert told["max_seg_per_batch"] == most
        assert told["sliding_window_length"] == (window or 0)
        assert told["fmha_scale"] == pytest.approx(64**-0.5)
        # Lengths of queries and keys, and places: one more than segments.
        assert line.count(f"tensor<2x{most}xi32>") == line.count(f"tensor<2x{most + 1}xi32>") == 2
        assert f"tensor<{2 * most}x4x{time}xf32>" in line


# ---------------------------------------------------------------------------------------------- on a mesh


def test_sharded(run_python):
    run_python(f"from {__name__} import check_sharded; check_sharded()", devices=4)


def check_sharded():
    """Each device has the segments of its own rows, of which one's do not fit."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = answer_for_cudnn(monkeypatch)
        inputs, weight, mask = make_case("more than there may be")
        expected = results(attend_dense, inputs, weight, mask)
        layout = parallel.Layout(parallel.make_mesh(1, 2, 1, 2), "zero3")
        with layout.use():
            got = results(attend, inputs, weight, dataclasses.replace(mask, kernel="cudnn"))
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, atol=5e-6)
        assert {call["query"].shape for call in calls} == {(1, 96, 2, 16)}
