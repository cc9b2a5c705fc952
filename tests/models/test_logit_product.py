"""Logits reduced, and their cotangents made, in one kernel with their product, against closed forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrft.models import logit_choice, logit_product
from jaxrft.models.logit_choice import choose_way, product_fault
from jaxrft.models.logit_chunks import Reduction
from jaxrft.models.logit_product import Cotangents, cotangents_of, differentiate_product, reduce_product, refusal
from jaxrft.models.logprobs import _projected

RECENT = jax.__version_info__ >= (0, 11)
TIED = pytest.param(True, marks=pytest.mark.skipif(not RECENT, reason="JAX 0.10 interprets no tied kernel"))


def interpreted():
    """Pallas' parameters; JAX 0.10 has them for itself, and finds no races."""
    if RECENT:
        return plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


@pytest.fixture(autouse=True)
def no_races():
    """Of what one warpgroup writes to shared memory and what copies read there, as far as Pallas' interpreter sees."""
    yield
    if RECENT:
        from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

        assert not get_races().races_found


def inputs(tokens, hidden, words, dtype="bfloat16", scale=1.0):
    rng = np.random.default_rng(tokens + words)
    states = jnp.asarray(rng.normal(size=(tokens, hidden)) * hidden**-0.25, dtype)
    kernel = jnp.asarray(rng.normal(size=(hidden, words)) * hidden**-0.25 * scale, dtype)
    places = rng.integers(-20, words + 20, tokens).astype(np.int32)
    places[:1] = words - 1
    return states, kernel, places, rng.uniform(0.4, 2, tokens).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, TIED])
@pytest.mark.parametrize(
    ("tokens", "hidden", "words", "dtype", "scale"),
    [(1, 64, 128, "bfloat16", 1), (300, 320, 400, "bfloat16", 1e3), (257, 64, 256, "float16", 1)],
)
def test_reduction(tokens, hidden, words, dtype, transposed, scale):
    """Of tokens and words that fill tiles and that do not, and of targets on other devices."""
    states, kernel, places, sharpness = inputs(tokens, hidden, words, dtype, scale)
    run = jax.jit(functools.partial(reduce_product, transposed=transposed, interpret=interpreted()))
    parts = run(states, kernel.T if transposed else kernel, places, sharpness)
    whole = words // 128 * 128
    logits = (np.float64(states) @ np.float64(kernel))[:, :whole]
    tiles = logits.reshape(tokens, -1, 128).transpose(1, 0, 2)
    shifted = (tiles - tiles.max(-1, keepdims=True)) * sharpness[None, :, None]
    inside = (places >= 0) & (places < whole)
    chosen = np.where(inside, logits[np.arange(tokens), np.where(inside, places, 0)], 0)
    moments = (np.exp(shifted) * shifted).sum(-1)
    for part, expected in zip(parts, (tiles.max(-1), np.exp(shifted).sum(-1), moments)):
        assert part.shape == (whole // 128, tokens)
        assert part.dtype == jnp.float32
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-4 * max(scale, 1))
    np.testing.assert_allclose(np.sum(parts[3], 0), chosen, rtol=1e-5, atol=1e-5 * scale)
    # A target that is the largest logit has exactly this value: its probability is not more than 1.
    largest = inside & (chosen == logits.max(-1))
    np.testing.assert_array_equal(np.sum(parts[3], 0)[largest], np.max(parts[0], 0)[largest])


@pytest.mark.parametrize("transposed", [False, TIED])
@pytest.mark.parametrize(
    ("tokens", "hidden", "words", "dtype", "scale"),
    [
        (1, 64, 128, "bfloat16", 1),
        (300, 320, 400, "bfloat16", 1e3),
        (257, 64, 256, "float16", 1),
        (40, 128, 72, "bfloat16", 1),
    ],
)
def test_cotangents(tokens, hidden, words, dtype, transposed, scale):
    """Of sharp distributions too, of which the largest logits' digits must not be lost."""
    states, kernel, places, sharpness = inputs(tokens, hidden, words, dtype, scale)
    logits = np.float64(states) @ np.float64(kernel)
    peak = logits.max(-1)
    log_norm = np.log(np.exp((logits - peak[:, None]) * sharpness[:, None]).sum(-1))
    log_p = (logits - peak[:, None]) * sharpness[:, None] - log_norm[:, None]
    entropy = scipy.special.entr(np.exp(log_p)).sum(-1)
    d_logprobs, d_entropy = np.random.default_rng(1).normal(size=(2, tokens))
    d_z = -np.exp(log_p) * (d_logprobs[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))
    d_z += (np.arange(words) == places[:, None]) * d_logprobs[:, None]
    rows = (np.float32(row) for row in (sharpness, entropy, peak, log_norm, d_logprobs, d_entropy))
    run = functools.partial(differentiate_product, transposed=transposed, interpret=interpreted())
    found = jax.jit(run)(states, kernel.T if transposed else kernel, places, cotangents_of(*rows))
    assert found.shape == (tokens, words)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float64(found), d_z * sharpness[:, None], rtol=1e-2, atol=5e-3 if scale > 1 else 1e-4)


@pytest.mark.parametrize("transposed", [False, TIED])
@pytest.mark.parametrize(("words", "chunk"), [(384, None), (328, 128)])
def test_logprobs_and_gradients(words, transposed, chunk, monkeypatch):
    """As a training step has them; of words that the last tile leaves over too."""
    called = []
    for right in (reduce_product, differentiate_product):

        def kernel(*arguments, right=right):
            called.append(right)
            return right(*arguments, interpret=interpreted())

        monkeypatch.setattr(logit_product, right.__name__, kernel)
    states, kernel, places, sharpness = inputs(150, 64, words)
    places, kernel = np.clip(places, 0, words - 1), np.float32(kernel)
    rows = [np.float32(np.random.default_rng(2).normal(size=(3, 50))) for _ in range(2)]

    def loss(hidden, kernel, way):
        shaped = (array.reshape(3, 50, *array.shape[1:]) for array in (hidden, places, 1 / sharpness))
        hidden, targets, temperature = shaped
        results = _projected(hidden, kernel, targets, temperature, Reduction(transposed, None, chunk, way))
        return sum(jnp.sum(weight * result) for weight, result in zip(rows, results)), results

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    weights = kernel.T if transposed else kernel
    (_, values), gradients = run(states, weights, "product")
    log_p = scipy.special.log_softmax(np.float64(states) @ kernel * sharpness[:, None], axis=-1)
    np.testing.assert_allclose(values[0].ravel(), log_p[np.arange(150), places], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values[1].ravel(), scipy.special.entr(np.exp(log_p)).sum(-1), rtol=1e-4, atol=1e-4)
    assert set(called) == {reduce_product, differentiate_product}
    d_logprobs, d_entropy = (row.reshape(-1, 1) for row in rows)
    p, entropy = np.exp(log_p), np.float64(values[1]).reshape(-1, 1)
    d_z = (np.arange(words) == places[:, None]) * d_logprobs - p * (d_logprobs + d_entropy * (log_p + entropy))
    d_z = d_z * sharpness[:, None]
    d_kernel = np.float64(states).T @ d_z
    for ours, theirs in zip(gradients, (d_z @ kernel.T, d_kernel.T if transposed else d_kernel)):
        ours = np.float64(ours)
        # What is lost is what rounding the logits' cotangents to 16 bits loses.
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_what_the_kernels_take():
    assert refusal(jnp.bfloat16, 896, 151936, True) is None
    assert refusal("float16", 64, 192, False) is None
    assert refusal(jnp.float32, 896, 151936, True) == "takes 16 bits, not float32"
    assert refusal(jnp.bfloat16, 100, 151936, True) == "takes multiples of 64 channels, not 100"
    assert refusal(jnp.bfloat16, 64, 1000, False) == "takes a multiple of 64 words, 128 at least, not 1000"
    assert refusal(jnp.bfloat16, 64, 1001, True) == "takes a multiple of 8 words, 128 at least, not 1001"
    assert refusal(jnp.bfloat16, 64, 1000, True) is None
    assert refusal(jnp.bfloat16, 64, 64, True) == "takes a multiple of 8 words, 128 at least, not 64"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "words"),
    [logit_choice.TRIAL, (1, 64, 192), (8192, 1536, 151936), (300, 896, 151936 // 2), (7, 64, 136)],
)
def test_they_become_programs_of_a_gpu(tokens, hidden, words, transposed):
    """No GPU is needed to translate them: what they take can be translated, to begin with."""
    if reason := refusal(jnp.bfloat16, hidden, words, transposed):
        assert (transposed, words) == (False, 136), reason
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    row, places = (jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (jnp.float32, jnp.int32))
    sizes = (tokens, hidden), (words, hidden) if transposed else (hidden, words)
    arrays = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        for kernel, rest in ((reduce_product, row), (differentiate_product, Cotangents(*[row] * 6))):
            program = jax.jit(functools.partial(kernel, transposed=transposed))
            lowered = program.trace(*arrays, places, rest).lower(lowering_platforms=("cuda",))
            assert lowered.as_text().count("mosaic_gpu") > 0


@pytest.mark.parametrize("transposed", [False, TIED])
def test_a_trial(transposed, monkeypatch):
    """Also while a program is traced. It sees what is wrong with the targets, with the others, and with the sums."""
    trial = functools.partial(product_fault.__wrapped__, "bfloat16", transposed, (40, 128, 192), interpreted())
    found = []
    jax.jit(lambda x: found.append(trial()) or x)(1.0)
    assert found == [None]
    reduce, differentiate = logit_product.reduce_product, logit_product.differentiate_product

    def shifted(hidden, kernel, places, *rest, **how):
        return differentiate(hidden, kernel, places + 1, *rest, **how)

    def without_norm(hidden, kernel, places, rows, **how):
        return differentiate(hidden, kernel, places, rows._replace(log_norm=rows.log_norm + 0.1), **how)

    def of_the_targets_alone(hidden, kernel, places, rows, **how):
        return differentiate(
            hidden, kernel, places, rows._replace(factor=rows.factor * 0, log_factor=rows.peak * 0), **how
        )

    for wrong, what in ((shifted, "targets"), (without_norm, "other words"), (of_the_targets_alone, "targets")):
        monkeypatch.setattr(logit_product, "differentiate_product", wrong)
        assert f"gives wrong cotangents of {what} here" in trial()
    monkeypatch.setattr(logit_product, "reduce_product", lambda *a, **how: [part * 1.01 for part in reduce(*a, **how)])
    assert "gives wrong peaks here" in trial()


class Device:
    """A GPU, as far as is asked."""

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.fixture
def trials(monkeypatch):
    """A GPU of the kind on which everything works; what is tried is noted, and what it gives can be set."""
    asked, results = [], {}

    def product(dtype, transposed):
        asked.append((dtype, transposed))
        return results.get("product")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(results.get("capability", "9.0"))])
    monkeypatch.setattr(logit_choice, "product_fault", product)
    monkeypatch.setattr(logit_choice, "rows_fault", lambda: results.get("rows"))
    logit_choice._choose_on_a_gpu.cache_clear()
    yield asked, results
    logit_choice._choose_on_a_gpu.cache_clear()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_way_is_chosen_by_a_trial_of_its_own(dtype, transposed, trials, caplog):
    caplog.set_level("INFO")
    asked, _ = trials
    hidden = jnp.zeros((2, 320), dtype)
    kernel = jnp.zeros((192, 320) if transposed else (320, 192), dtype)
    for _ in range(2):
        assert Reduction(transposed).chosen_way(hidden, kernel) == "product"
    assert asked == [(dtype, transposed)]
    assert [record.getMessage() for record in caplog.records] == ["logits: reduced by product"]


@pytest.mark.parametrize(
    ("changed", "arguments", "way", "level", "text"),
    [
        ({"product": "is wrong"}, {}, "rows", "WARNING", "reduced by rows; one kernel with the product is wrong"),
        ({"product": "is wrong", "rows": "fails"}, {}, "plain", "WARNING", "; a kernel that reads them once fails"),
        ({"capability": "8.0"}, {}, "rows", "INFO", "is for GPUs of compute capability 9.0, not 8.0"),
        ({"capability": "8.0", "rows": "fails"}, {}, "plain", "WARNING", "a kernel that reads them once fails"),
        ({}, {"dtype": "float32"}, "rows", "INFO", "takes 16 bits, not float32"),
        ({}, {"hidden": 100}, "rows", "INFO", "takes multiples of 64 channels, not 100"),
        ({}, {"words": 1000}, "rows", "INFO", "takes a multiple of 64 words, 128 at least, not 1000"),
    ],
)
def test_other_ways_and_why(changed, arguments, way, level, text, trials, caplog):
    caplog.set_level("INFO")
    asked, results = trials
    results |= changed
    assert choose_way(**{"dtype": "bfloat16", "hidden": 320, "words": 192, "transposed": False} | arguments) == way
    assert caplog.records[-1].levelname == level
    assert text in caplog.records[-1].getMessage()
    assert bool(asked) == ("product" in changed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_as_compiled(dtype, transposed):
    """On a Hopper GPU they are right and taken; on another one they are not taken."""
    way = choose_way(jnp.dtype(dtype), 896, 151936, transposed)
    if jax.local_devices()[0].compute_capability == "9.0":
        assert product_fault(dtype, transposed) is None
        assert way == "product"
    else:
        assert way != "product"
