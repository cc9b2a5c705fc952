"""Forward, gradient, packing and decoding of every family against transformers, in float32 on the CPU."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxrft import models
from jaxrft.models import families
from jaxrft.models.checkpoint import named_tensors
from jaxrft.models.layers import LayerCache
from jaxrft.models.rope import inverse_frequencies
from jaxrft.models.spec import RopeSpec
from tests.models.cases import Case, make_case
from tests.models.configs import CASES, LLAMA3, random_tokens

LENGTHS = np.array([23, 17, 1, 9], np.int32)
TOKENS = random_tokens((4, 23))
VALID = np.arange(23) < LENGTHS[:, None]
TEMPERATURE = 0.7


# Windows, rotary scaling and biases among them.
ONE_OF_EACH_FAMILY = ["qwen2-windows", "qwen3", "llama3-bias", "mistral"]


def run(case: Case, function, *args):
    """``function`` of the model and ``args``, jitted."""
    graph, state = nnx.split(case.model)
    return jax.jit(lambda state, args: function(nnx.merge(graph, state), *args))(state, args)


def torch_logits(case: Case, tokens, valid=None) -> torch.Tensor:
    mask = None if valid is None else torch.tensor(valid, dtype=torch.long)
    return case.torch_model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask).logits


def test_logits(case):
    ours = run(case, lambda model: model(TOKENS, LENGTHS))
    with torch.no_grad():
        theirs = torch_logits(case, TOKENS, VALID).numpy()
    assert ours.dtype == jnp.float32
    assert np.abs(theirs[VALID]).max() > 1
    np.testing.assert_allclose(np.asarray(ours)[VALID], theirs[VALID], atol=1e-4, rtol=0)


def test_gradients(case):
    """Of every parameter, by the table of names, through log-probabilities and entropies at a temperature."""
    weights = np.random.default_rng(1).normal(size=(2, 4, 22)).astype(np.float32) * VALID[:, 1:]
    graph, state = nnx.split(case.model)

    @jax.jit
    @jax.value_and_grad
    def loss_of(state):
        logprobs, entropy = models.token_logprobs(nnx.merge(graph, state), TOKENS, LENGTHS, TEMPERATURE)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    loss, gradients = loss_of(state)
    all_logprobs = torch.log_softmax(torch_logits(case, TOKENS, VALID)[:, :-1] / TEMPERATURE, -1)
    targets = torch.tensor(TOKENS[:, 1:, None], dtype=torch.long)
    chosen, entropy = all_logprobs.gather(-1, targets)[..., 0], -(all_logprobs.exp() * all_logprobs).sum(-1)
    torch_loss = (torch.tensor(weights[0]) * chosen + torch.tensor(weights[1]) * entropy).sum()
    case.torch_model.zero_grad()
    torch_loss.backward()
    np.testing.assert_allclose(loss, torch_loss.item(), rtol=1e-5, atol=1e-4)

    theirs = {name: parameter.grad.numpy() for name, parameter in case.torch_model.named_parameters()}
    ours = {t.name: a.T if t.transposed else a for t, a in named_tensors(nnx.merge(graph, gradients))}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.abs(expected).max() > 1e-3, name
        error = np.linalg.norm(np.asarray(ours[name]) - expected) / np.linalg.norm(expected)
        assert error < 1e-4, f"{name}: relative error {error}"


def test_the_documented_family(monkeypatch, tmp_path):
    """The declaration and the case of docs/add-a-family.md, as they stand there."""
    text = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text()
    declaration, _, added = re.findall(r"```python\n([^>].*?)```", text, re.DOTALL)
    scope: dict = {"Family": families.Family}
    exec(declaration, scope)
    monkeypatch.setitem(families.FAMILIES, "seed_oss", scope["SEED_OSS"])
    monkeypatch.setitem(CASES, "documented", eval(f"{{{added}}}")["seed_oss"])
    case = make_case("documented", tmp_path / "source")
    models.save(case.model, tmp_path / "export")
    assert models.load(tmp_path / "export").spec == case.model.spec
    test_logits(case)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_packed_segments_are_separate_rows(made_case, name):
    case, tokens = made_case(name), random_tokens((2, 23), seed=2)
    spans = [(0, 0, 7), (0, 7, 18), (0, 18, 23), (1, 0, 12), (1, 12, 20)]
    segment_ids = np.full((2, 23), -1, np.int32)
    separate, lengths = np.zeros((5, 12), np.int32), np.array([end - start for _, start, end in spans])
    for index, (row, start, end) in enumerate(spans):
        segment_ids[row, start:end] = index
        separate[index, : end - start] = tokens[row, start:end]

    def results(model, tokens, lengths, segment_ids):
        logprobs = models.token_logprobs(model, tokens, lengths, TEMPERATURE, segment_ids=segment_ids)
        return model(tokens, lengths, segment_ids=segment_ids), *logprobs

    logits, logprobs, entropy = (np.asarray(x) for x in run(case, results, tokens, np.array([23, 20]), segment_ids))
    alone = run(case, results, separate, lengths, None)
    for index, (row, start, end) in enumerate(spans):
        length = end - start
        np.testing.assert_allclose(logits[row, start:end], alone[0][index, :length], atol=2e-5, rtol=0)
        np.testing.assert_allclose(logprobs[row, start : end - 1], alone[1][index, : length - 1], atol=2e-5, rtol=0)
        np.testing.assert_allclose(entropy[row, start : end - 1], alone[2][index, : length - 1], atol=2e-5, rtol=0)
        assert np.all(logprobs[row, start : end - 1] < 0)
        # The next segment's first token, and what stands past the length, is not predicted.
        assert not logprobs[row, end - 1 : end].any()
        assert not entropy[row, end - 1 : end].any()
    assert not logprobs[1, 19:].any()
    assert not np.asarray(alone[1])[2, 4:].any()


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_decoding_equals_the_whole_forward(made_case, name):
    """Prompts of different lengths are prefilled, then each slot is fed the rest of its row."""
    case, prompts, steps = made_case(name), np.array([7, 3, 12, 1], np.int32), 11
    tokens = TOKENS
    expected = np.asarray(run(case, lambda model: model(tokens)))
    rows = np.arange(4)

    def prefill(model, prompt):
        hidden, caches = model.prefill(prompt, prompts)
        slots = [
            LayerCache(*(e.at[:, :, :12].set(n) for e, n in zip(*pair)))
            for pair in zip(model.init_cache(4, 32), caches)
        ]
        return model.logits(hidden), slots

    logits, caches = run(case, prefill, tokens[:, :12])
    np.testing.assert_allclose(logits, expected[rows, prompts - 1], atol=1e-4, rtol=0)
    graph, state = nnx.split(case.model)

    @jax.jit
    def decode(state, tokens, positions, caches):
        model = nnx.merge(graph, state)
        # A window that is shorter than the cache and just above the last position.
        hidden, caches = model.decode(tokens, positions, caches, 23)
        return model.logits(hidden), caches

    for step in range(steps):
        positions = prompts + step
        logits, caches = decode(state, tokens[rows, positions], positions, caches)
        np.testing.assert_allclose(logits, expected[rows, positions], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},
    ],
)
def test_rotary_frequencies(rope):
    """At the sizes of real models, to the last bits: angles at position 100,000 multiply the difference."""
    config = CONFIG_MAPPING["llama"](rope_parameters=dict(rope), max_position_embeddings=131072)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        expected = 1.0 / (theta ** (torch.arange(0, 128, 2, dtype=torch.float) / 128))
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config)
        assert scale == 1.0
    spec = RopeSpec(theta=theta, kind=kind, factor=rope.get("factor", 1.0), original_max_positions=8192)
    np.testing.assert_allclose(inverse_frequencies(spec, 128), expected.numpy(), rtol=3e-7)


def test_bfloat16_activations(made_case):
    """Within bfloat16's precision of the float32 model; parameters, log-probabilities and logits stay float32."""
    case = made_case("qwen3-windows-bias")
    model = models.load(case.folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda: model.hidden(TOKENS)).dtype == jnp.bfloat16
    case = dataclasses.replace(case, model=model)
    logits, logprobs = run(case, lambda model: (model(TOKENS), models.token_logprobs(model, TOKENS, LENGTHS)[0]))
    assert logits.dtype == logprobs.dtype == jnp.float32
    with torch.no_grad():
        expected = torch_logits(case, TOKENS).numpy()
    error = np.abs(np.asarray(logits) - expected)
    assert 1e-4 < error.mean() < 0.02 * expected.std()
