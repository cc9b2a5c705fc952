"""Parts of the decoder against hand-made examples; no torch needed."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrft import models
from jaxrft.models.attention import causal_mask
from jaxrft.models.decoder import default_positions
from tests.models.configs import CASES, SHAPE, VOCAB, random_tokens


def test_positions_restart_in_each_segment():
    tokens = np.zeros((2, 7), np.int32)
    segment_ids = np.array([[4, 4, 4, 0, 0, 1, 4], [0, 1, 1, 1, 1, -1, -1]])
    np.testing.assert_array_equal(default_positions(tokens, None), [[0, 1, 2, 3, 4, 5, 6]] * 2)
    expected = [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 0, 1]]
    np.testing.assert_array_equal(default_positions(tokens, segment_ids), expected)


def test_mask_by_definition():
    segment_ids = np.array([[0, 0, 0, 1, 1, 1, 1]])
    mask = np.asarray(causal_mask(7, 3, segment_ids).visible(np.arange(7)))
    for query in range(7):
        for key in range(7):
            seen = key <= query and query - key < 3 and segment_ids[0, key] == segment_ids[0, query]
            assert mask[0, query, key] == seen


def test_positions_given_by_the_caller():
    """Rotary positions count: shifted all alike they change nothing, stretched they do."""
    model, tokens = models.from_config({**SHAPE, **CASES["qwen2"], "initializer_range": 0.3}), random_tokens((1, 6))
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, positions: nnx.merge(graph, state)(tokens, positions=positions))
    count = np.arange(6)[None]
    plain, shifted, stretched = (logits(state, positions) for positions in (count, count + 100, 7 * count))
    np.testing.assert_allclose(plain, shifted, atol=1e-3)
    assert np.abs(np.asarray(plain - stretched)).max() > 0.1


def test_families_and_attributes():
    assert models.supported_families() == ("llama", "mistral", "qwen2", "qwen3")
    model = models.from_config({**SHAPE, **CASES["qwen3"]})
    assert model.output_kernel.shape == (48, VOCAB)
    axes = {parameter.get_metadata()["axes"] for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert {("embed", "heads"), ("mlp", "embed"), ("vocab", "embed"), ("embed", "vocab"), ("norm",)} <= axes
    with pytest.raises(ValueError, match="media: this is a text model"):
        model(random_tokens((1, 3)), media=object())
