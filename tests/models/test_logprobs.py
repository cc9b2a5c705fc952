"""Fused log-probabilities and entropies against the direct formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrft.models import logit_choice, logit_kernel
from jaxrft.models.logit_chunks import ALIGNMENT, Reduction, chunk_size, logits_elements, reduce_logits
from jaxrft.models.logit_kernel import reduce_rows
from jaxrft.models.logprobs import projected_logprobs, token_logprobs

TOKENS, HIDDEN, VOCAB = 37, 12, 50
RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, VOCAB, TOKENS)
TEMPERATURE = RNG.uniform(0.4, 2.0, TOKENS).astype(np.float32)
WEIGHTS = RNG.normal(size=(2, TOKENS)).astype(np.float32)
INPUTS = RNG.normal(size=(TOKENS, HIDDEN)).astype(np.float32), RNG.normal(size=(HIDDEN, VOCAB)).astype(np.float32)


def direct(hidden, kernel, targets=TARGETS, temperature=TEMPERATURE):
    """Value of both results, and gradients of their weighted sum, in float64."""
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    z = hidden @ kernel / temperature[:, None]
    log_p = scipy.special.log_softmax(z, axis=-1)
    p = np.exp(log_p)
    logprobs, entropy = log_p[np.arange(TOKENS), targets], scipy.special.entr(p).sum(-1)
    onehot = np.eye(VOCAB)[targets]
    # d entropy / d z = -p (log p + entropy), from the Jacobian of softmax.
    d_z = WEIGHTS[0][:, None] * (onehot - p) - WEIGHTS[1][:, None] * p * (log_p + entropy[:, None])
    d_z = d_z / temperature[:, None]
    return logprobs, entropy, d_z @ kernel.T, hidden.T @ d_z


def weighted(hidden, kernel, targets, temperature, chunk, transposed=False):
    logprobs, entropy = projected_logprobs(hidden, kernel, targets, temperature, chunk, transposed=transposed)
    return jnp.sum(WEIGHTS[0] * logprobs.ravel() + WEIGHTS[1] * entropy.ravel()), (logprobs, entropy)


gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True), static_argnums=(4, 5))


def test_the_formula_of_the_reference_is_the_derivative():
    """Central differences, in float64, so that the closed form below is not taken on trust."""
    _, _, d_hidden, d_kernel = direct(*INPUTS)
    for argument, analytic in ((0, d_hidden), (1, d_kernel)):
        for index in [(0, 0), (5, 3), (11, 11)]:
            values = []
            for sign in (1, -1):
                inputs = [x.astype(np.float64) for x in INPUTS]
                inputs[argument][index] += sign * 1e-5
                logprobs, entropy, *_ = direct(*inputs)
                values.append(np.sum(WEIGHTS[0] * logprobs + WEIGHTS[1] * entropy))
            assert analytic[index] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("chunk", "transposed"), [(1, False), (5, True), (7, False), (49, True), (50, False), (1000, True), (None, False)]
)
def test_values_and_gradients(chunk, transposed):
    hidden, kernel = INPUTS[0], INPUTS[1].T if transposed else INPUTS[1]
    (_, results), (d_hidden, d_kernel) = gradient(hidden, kernel, TARGETS, TEMPERATURE, chunk, transposed)
    for ours, expected in zip((*results, d_hidden, d_kernel.T if transposed else d_kernel), direct(*INPUTS)):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("vocab", [1, 50, 32000, 151936])
@pytest.mark.parametrize("tokens", [1, 64, 8192, 100_000])
def test_chunks_are_nearly_equal(tokens, vocab, platform):
    size = chunk_size(tokens, vocab, platform)
    assert size == vocab or (size < vocab and size % ALIGNMENT == 0)
    chunks = -(-vocab // size)
    assert size - ALIGNMENT * chunks < vocab - (chunks - 1) * size <= size
    elements = 2**20 if platform == "cpu" else 2**27
    assert logits_elements(tokens, vocab, platform) <= max(elements, tokens * 1024) + ALIGNMENT * tokens


def test_a_batch_axis():
    """Of rows and time steps, here in chunks of 3 columns."""
    pad = 5 * 8 - TOKENS
    hidden = np.pad(INPUTS[0], ((0, pad), (0, 0))).reshape(5, 8, HIDDEN)
    targets = np.pad(TARGETS, (0, pad)).reshape(5, 8)
    temperature = np.pad(TEMPERATURE, (0, pad), constant_values=1).reshape(5, 8)
    logprobs, entropy = projected_logprobs(hidden, INPUTS[1], targets, temperature, 3)
    assert logprobs.shape == entropy.shape == (5, 8)
    expected = direct(*INPUTS)
    np.testing.assert_allclose(logprobs.ravel()[:TOKENS], expected[0], atol=2e-5)
    np.testing.assert_allclose(entropy.ravel()[:TOKENS], expected[1], atol=2e-5)

    def loss(hidden):
        results = projected_logprobs(hidden, INPUTS[1], targets, temperature, 3)
        return sum(jnp.sum(w * r.ravel()[:TOKENS]) for w, r in zip(WEIGHTS, results))

    d_hidden = jax.jit(jax.grad(loss))(hidden)
    np.testing.assert_allclose(d_hidden.reshape(-1, HIDDEN)[:TOKENS], expected[2], atol=2e-5)
    assert not d_hidden.reshape(-1, HIDDEN)[TOKENS:].any()


def test_bfloat16_hidden_states():
    """Sums are float32: rounding the inputs is all that is lost in the values."""
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in INPUTS]
    (_, results), gradients = gradient(jnp.asarray(INPUTS[0], jnp.bfloat16), INPUTS[1], TARGETS, TEMPERATURE, 10)
    expected = direct(*rounded)
    for ours, theirs in zip(results, expected):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    for ours, theirs in zip(gradients, expected[2:]):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.01 * np.linalg.norm(theirs)


@pytest.mark.parametrize("spread", [3, 1e4])
@pytest.mark.parametrize("columns", [1, 100, 1024, 1500, 4500])
@pytest.mark.parametrize("tokens", [1, 6, pytest.param(6, marks=pytest.mark.gpu, id="6-compiled")])
def test_the_kernel_of_one_pass(tokens, columns, spread):
    """Of columns that fill its blocks and that do not, and of targets in other chunks; on a CPU, interpreted."""
    logits = np.random.default_rng(columns).normal(size=(6, columns)).astype(np.float32) * np.float32(spread)
    # Peaks that fall, that rise with every block, and where all logits are far from 0.
    logits[0:2].sort(), logits[4:6].sort()
    logits += np.array([[0], [999], [0], [0], [99], [-999]], np.float32)
    logits[0] = logits[0, ::-1]
    places, sharpness = np.array([-1, columns, 0, columns - 1, columns // 2, 0]), np.array([0.1, 1, 10, 0.1, 1, 10])
    logits, places, sharpness = (array[-tokens:] for array in (logits, places, np.float32(sharpness)))
    peak, norm, moment, chosen = jax.jit(reduce_rows)(logits, places, sharpness)
    np.testing.assert_array_equal(peak, logits.max(-1))
    inside = (places >= 0) & (places < columns)
    np.testing.assert_array_equal(chosen, np.where(inside, logits[np.arange(tokens), np.where(inside, places, 0)], 0))
    shifted = (np.float64(logits) - peak[:, None]) * np.float64(sharpness)[:, None]
    np.testing.assert_allclose(norm, np.exp(shifted).sum(-1), rtol=3e-6)
    np.testing.assert_allclose(moment, (np.exp(shifted) * shifted).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [7, None])
def test_reduction_in_one_pass(chunk):
    """As in the passes that XLA makes of it."""

    def run(way):
        how = Reduction(chunk=chunk, way=way)
        return jax.jit(reduce_logits, static_argnums=0)(how, *INPUTS, TARGETS, 1 / TEMPERATURE)

    for ours, theirs in zip(run("rows"), run("plain"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e-30])
def test_extreme_logits_stay_finite(size):
    """One logit towers over the others, or all are equal: entropy 0 or log(vocabulary), and no NaN."""
    kernel = np.full((HIDDEN, VOCAB), -size, np.float32)
    kernel[:, 3] = size
    hidden = np.full((TOKENS, HIDDEN), 1 / HIDDEN, np.float32)
    (_, (logprobs, entropy)), gradients = gradient(hidden, kernel, TARGETS, TEMPERATURE, 10)
    expected = direct(hidden, kernel)
    np.testing.assert_allclose(logprobs, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected[2:]):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(np.abs(theirs).max(), 1))


def test_other_arguments_have_no_gradient():
    """The temperature's cotangent is zero and the targets' is of type float0, in jit and out of it."""
    arguments = (*INPUTS, TARGETS, TEMPERATURE)
    for transform in (jax.jit, lambda f: f):
        d_temperature = transform(jax.grad(lambda *a: weighted(*a, 10)[0], argnums=3))(*arguments)
        assert not d_temperature.any()
    _, vjp = jax.vjp(lambda targets: projected_logprobs(*INPUTS, targets, TEMPERATURE), TARGETS)
    (d_targets,) = vjp((jnp.ones(TOKENS), jnp.ones(TOKENS)))
    assert d_targets.dtype == jax.dtypes.float0


class Output:
    """Just what token_logprobs asks of a model."""

    def __init__(self, hidden, kernel):
        self.states, self.output_kernel = jnp.asarray(hidden), jnp.asarray(kernel)

    def hidden(self, tokens, lengths, *, positions, segment_ids, media):
        return self.states


def test_token_logprobs_shift_and_lengths():
    hidden, kernel = RNG.normal(size=(3, 6, HIDDEN)), INPUTS[1]
    tokens, lengths = RNG.integers(0, VOCAB, (3, 6)), np.array([6, 4, 1])
    temperature = RNG.uniform(0.5, 2, (3, 5))
    for value in (temperature, 0.8):
        logprobs, entropy = token_logprobs(Output(hidden, kernel), tokens, lengths, value)
        scale = np.broadcast_to(value, (3, 5))[..., None]
        log_p = scipy.special.log_softmax(hidden[:, :5] @ kernel / scale, axis=-1)
        for row in range(3):
            for step in range(5):
                inside = step + 1 < lengths[row]
                expected = log_p[row, step, tokens[row, step + 1]] if inside else 0
                assert logprobs[row, step] == pytest.approx(expected, abs=2e-5)
                assert entropy[row, step] == pytest.approx(
                    scipy.special.entr(np.exp(log_p[row, step])).sum() if inside else 0, abs=2e-5
                )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_hold_the_logits(dtype):
    """At a vocabulary of 150,000, by the compiled programs: nothing is allocated."""
    batch, time, size, vocab = 4, 1024, 128, 150_000

    def loss(hidden, kernel, targets, temperature):
        logprobs, entropy = projected_logprobs(hidden, kernel, targets, temperature)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    shapes = (
        jax.ShapeDtypeStruct((batch, time, size), dtype),
        jax.ShapeDtypeStruct((size, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), jnp.int32),
        jax.ShapeDtypeStruct((batch, time), jnp.float32),
    )
    logits, states = 4 * logits_elements(batch * time, vocab), 4 * batch * time * size
    # XLA's CPU compiler multiplies no bfloat16: it casts the kernel again.
    casts = 2 * 4 * size * vocab if dtype == "bfloat16" else 0
    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        # A few chunks, and what is of the hidden states' size; of the kernel's, only its gradient, which is a result.
        assert memory.temp_size_in_bytes < 5 * logits + 5 * states + casts < 4 * batch * time * vocab / 4


def test_8_devices(run_python):
    """Tokens and vocabulary sharded, whichever way the kernel lies: values and gradients of one device."""
    run_python(
        """
import jax, numpy as np
import jax.numpy as jnp
from jaxrft import parallel
from jaxrft.models.logit_chunks import Reduction
from jaxrft.models.logprobs import _projected
rng = np.random.default_rng(0)
hidden, kernel = rng.normal(size=(4, 6, 8)).astype(np.float32), rng.normal(size=(8, 64)).astype(np.float32)
targets, weights = rng.integers(0, 64, (4, 6)), rng.normal(size=(2, 4, 6)).astype(np.float32)
temperature = rng.uniform(0.5, 2, (4, 6)).astype(np.float32)
def loss(hidden, kernel, how):
    values = _projected(hidden, kernel, targets, temperature, how)
    return jnp.sum(weights * jnp.stack(values)), values
run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
expected = jax.tree.leaves(run(hidden, kernel, Reduction()))
for transposed in (False, True):
    for mesh, strategy in (({"fsdp": 2, "sequence": 2, "tensor": 2}, "fsdp"), ({"tensor": 8}, "ddp"),
                           ({"replica": 2, "sequence": 2, "tensor": 2}, "zero2")):
        with parallel.Layout(parallel.make_mesh(**mesh), strategy).use():
            arguments = hidden, kernel.T if transposed else kernel
            found = jax.tree.leaves(run(*arguments, Reduction(transposed, None, 5)))
            # Pallas cannot interpret a kernel here: they are put in their places, and not run.
            jax.eval_shape(run, *arguments, Reduction(transposed, None, 5, way="rows"))
            sizes = (4, 6, 64), (2560, 64) if transposed else (64, 2560)
            shapes = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes)
            jax.eval_shape(run, *shapes, Reduction(transposed, way="product"))
        found[-1] = found[-1].T if transposed else found[-1]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
""",
        devices=8,
    )


def test_the_kernel_is_tried_before_it_is_taken(monkeypatch, caplog):
    """As where it is asked for: while a program is traced. One that forgets the last columns is not taken."""
    found = []
    jax.jit(lambda x: found.append(logit_choice.rows_fault()) or x)(1.0)
    assert found == [None]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    right = logit_kernel.reduce_rows
    for forgets, way in ((0, "rows"), (8, "plain")):
        monkeypatch.setattr(
            logit_kernel,
            "reduce_rows",
            lambda logits, *rest, forgets=forgets: right(logits[:, forgets:], *rest, interpret=True),
        )
        logit_choice.rows_fault.cache_clear(), logit_choice._choose_on_a_gpu.cache_clear()
        assert logit_choice.choose_way(jnp.float32, 64, 128, True) == way
    logit_choice.rows_fault.cache_clear(), logit_choice._choose_on_a_gpu.cache_clear()
    assert "reduced by plain" in caplog.text
    assert "a kernel that reads them once gives wrong sums here" in caplog.text
