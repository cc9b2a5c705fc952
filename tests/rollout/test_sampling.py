"""Drawn tokens follow the distribution that was asked for: against NumPy, which sorts where the engine does not."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special, stats

from jaxrft.rollout import NativeEngine, Request, SamplingParams
from jaxrft.rollout.sampling import BLOCK, Mode, categorical, draw, sampling_values
from jaxrft.rollout.sampling import truncate as truncate_eagerly
from tests.rollout.tiny import VOCAB

DRAWS = 8192
STOPS = (2, 9, 11)
PROMPT = [4, 1, 7]
truncate = jax.jit(truncate_eagerly)
forward = nnx.jit(lambda model, tokens: model(tokens))

OPTIONS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 10, "top_p": 0.85, "min_p": 0.05},
    "min_tokens_1": {"min_tokens": 1, "top_k": 8},
    "min_tokens_2": {"min_tokens": 2},
    "fire": {"temperature": 0.5, "first_token_temperature": 2.0, "top_p": 0.9},
}


def exact_distribution(logits: np.ndarray, params: SamplingParams, index: int) -> np.ndarray:
    """Probability of each token at place ``index`` of a completion, in float64."""
    first = index == 0 and params.first_token_temperature is not None
    scaled = logits.astype(np.float64) / (params.first_token_temperature if first else params.temperature)
    if index < params.min_tokens:
        scaled[list(params.stop_token_ids)] = -np.inf
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
        p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def p_value(counts: np.ndarray, distribution: np.ndarray) -> float:
    """Of a chi-square test; tokens expected fewer than 5 times are counted together."""
    assert not counts[distribution == 0].any(), "a token was drawn that has no probability"
    expected = distribution * counts.sum()
    rare = (expected < 5) & (distribution > 0)
    keep = expected >= 5
    observed, expected = [*counts[keep], counts[rare].sum()], [*expected[keep], expected[rare].sum()]
    if expected[-1] < 5:  # not enough of them for a group of their own
        rest_observed, rest_expected = observed.pop(), expected.pop()
        smallest = int(np.argmin(expected))
        observed[smallest] += rest_observed
        expected[smallest] += rest_expected
    return float(stats.chisquare(observed, expected).pvalue) if len(expected) > 1 else 1.0


def next_logits(model, tokens: list[int]) -> np.ndarray:
    return np.asarray(forward(model, jnp.asarray([tokens])))[0, -1]


def counts_of(tokens) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_frequencies(model, name) -> None:
    params = SamplingParams(max_tokens=2, stop_token_ids=STOPS, seed=11, **OPTIONS[name])
    with NativeEngine(model, max_slots=1024, max_length=16, decode_chunk=2) as engine:
        completions = engine.generate([Request(prompt_ids=PROMPT, n=DRAWS)], params)
    first = exact_distribution(next_logits(model, PROMPT), params, 0)
    firsts = [completion.token_ids[0] for completion in completions]
    assert p_value(counts_of(firsts), first) > 1e-3
    # The second token, given the first: for the most frequent first tokens that do not stop.
    seconds = collections.defaultdict(list)
    for completion in completions:
        if len(completion.token_ids) == 2:
            seconds[completion.token_ids[0]].append(completion)
    assert not set(seconds) & set(STOPS)
    for token in sorted(seconds, key=lambda t: -len(seconds[t]))[:3]:
        distribution = exact_distribution(next_logits(model, [*PROMPT, token]), params, 1)
        drawn = [completion.token_ids[1] for completion in seconds[token]]
        assert p_value(counts_of(drawn), distribution) > 1e-3
        sampled = np.array([completion.sampled_logprobs for completion in seconds[token]])
        np.testing.assert_allclose(sampled[:, 0], np.log(first[token]), atol=1e-4)
        np.testing.assert_allclose(sampled[:, 1], np.log(distribution[drawn]), atol=1e-4)


def test_chi_square_sees_a_wrong_temperature(model) -> None:
    """The tests above would fail were the temperature 15% off."""
    params = SamplingParams(max_tokens=1, seed=11, temperature=0.6)
    with NativeEngine(model, max_slots=1024, max_length=16) as engine:
        completions = engine.generate([Request(prompt_ids=PROMPT, n=DRAWS)], params)
    counts = counts_of([completion.token_ids[0] for completion in completions])
    wrong = exact_distribution(next_logits(model, PROMPT), SamplingParams(temperature=0.69), 0)
    assert p_value(counts, wrong) < 1e-6


@pytest.mark.parametrize("kind", ["flat", "steep", "gaps"])
@pytest.mark.parametrize("vocab", [1, 2, BLOCK, BLOCK + 1, 5 * BLOCK + 60])
def test_draws_of_several_blocks(vocab, kind) -> None:
    """A vocabulary of one block, and of several, the last one smaller, some with nothing to be drawn."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=vocab) * (4 if kind == "steep" else 0.3) + 1000
    if kind == "gaps":
        logits[rng.random(vocab) < 0.5] = -np.inf
        logits[BLOCK : 3 * BLOCK] = -np.inf
        logits[0] = 1000
    rows = np.broadcast_to(logits.astype(np.float32), (DRAWS, vocab))
    tokens, log_norm = jax.jit(categorical)(rows, jax.random.split(jax.random.key(3), DRAWS), np.arange(DRAWS) % 7)
    exact = special.logsumexp(np.float32(logits).astype(np.float64))
    np.testing.assert_allclose(log_norm, np.full(DRAWS, exact), rtol=2e-7)
    counts = np.bincount(tokens, minlength=vocab)
    assert len(counts) == vocab
    assert p_value(counts, np.exp(np.float32(logits) - exact)) > 1e-3


@pytest.mark.parametrize("mode", [Mode(False, False, False), Mode(False, True, False), Mode(False, True, True)])
def test_log_probabilities_of_several_blocks(mode) -> None:
    """Before truncation, and of the distribution that is drawn from."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, 3 * BLOCK + 5)).astype(np.float32) * 3
    params = SamplingParams(temperature=0.7, top_k=40 * mode.truncate, min_tokens=1, stop_token_ids=(7, BLOCK + 1))
    keys, index = jax.random.split(jax.random.key(5), 64), np.zeros(64, np.int32)
    drawn = jax.jit(draw, static_argnums=5)(
        logits, keys, index, np.float32(params.temperature), sampling_values(params, ()), mode
    )
    whole = special.log_softmax(logits.astype(np.float64) / 0.7, axis=-1)
    scaled = logits.astype(np.float64) / 0.7
    if mode.forbid_stops:
        scaled[:, [7, BLOCK + 1]] = -np.inf
    if mode.truncate:
        scaled[scaled < np.sort(scaled, axis=-1)[:, [-40]]] = -np.inf
    rows = np.arange(64)
    np.testing.assert_allclose(drawn.logprobs, whole[rows, drawn.tokens], atol=5e-6)
    np.testing.assert_allclose(drawn.sampled_logprobs, special.log_softmax(scaled, -1)[rows, drawn.tokens], atol=5e-6)


def test_nothing_is_put_into_the_product_that_makes_the_logits() -> None:
    """What reads them stands behind a barrier: a compiler would have the product divide, in a pass of its own."""
    values = sampling_values(SamplingParams(), ())
    arguments = np.zeros((2, VOCAB), np.float32), jax.random.split(jax.random.key(0), 2), np.zeros(2, np.int32)
    made = jax.make_jaxpr(draw, static_argnums=5)(*arguments, np.float32(1), values, Mode(False, False, False)).jaxpr
    readers = [equation for equation in made.eqns if made.invars[0] in equation.invars]
    assert [equation.primitive.name for equation in readers] == ["optimization_barrier"]


SHARED_OUT = """
import re
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrft.rollout.sampling import BLOCK, categorical

rows = NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec("rows"))
logits = np.random.default_rng(0).normal(size=(6, 4 * BLOCK)).astype(np.float32)
arguments = logits, jax.random.split(jax.random.key(0), 6), np.arange(6)
program = jax.jit(categorical, in_shardings=rows).lower(*arguments).compile()
print(re.findall("all-gather|all-reduce|all-to-all|collective-permute", program.as_text()))
print(np.array_equal(jax.jit(categorical)(*arguments)[0], program(*jax.device_put(arguments, rows))[0]))
"""


def test_devices_that_share_out_the_rows_do_not_ask_each_other(run_python) -> None:
    assert run_python(SHARED_OUT, devices=2).stdout.split("\n")[:2] == ["[]", "True"]


@pytest.mark.parametrize("vocab", [1, 2, 50, 3000])
def test_truncation_keeps_what_sorting_keeps(vocab) -> None:
    rng = np.random.default_rng(vocab)
    cases = [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.5, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.3), (40, 0.9, 0.02)]
    for top_k, top_p, min_p in cases:
        logits = (5 * rng.standard_normal((6, vocab))).astype(np.float32)
        kept = np.isfinite(truncate(logits, top_k, top_p, min_p))
        params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
        expected = np.array([exact_distribution(row, params, 0) > 0 for row in logits])
        np.testing.assert_array_equal(kept, expected, err_msg=f"{top_k=} {top_p=} {min_p=}")


def test_truncation_keeps_all_tokens_of_a_tie() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]]))
    assert np.isfinite(truncate(logits, 1, 1.0, 0.0))[0].tolist() == [False, True, False, True, False, False]
    assert np.isfinite(truncate(logits, 0, 0.35, 0.0))[0].tolist() == [False, True, False, True, False, False]
    assert np.isfinite(truncate(logits, 3, 1.0, 0.0))[0].all()
    assert np.isfinite(truncate(logits, 0, 0.65, 0.0))[0].all()
    assert np.isfinite(truncate(logits, 0, 1.0, 1.0))[0].tolist() == [False, True, False, True, False, False]


def test_greedy_ties_go_to_the_lowest_token() -> None:
    logits = jnp.array([[1.0, 4.0, 4.0], [2.0, 2.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    values = sampling_values(SamplingParams(temperature=0.0), ())
    drawn = draw(logits, keys, jnp.zeros(2, int), jnp.float32(0), values, Mode(True, False, False))
    assert drawn.tokens.tolist() == [1, 0]
    np.testing.assert_allclose(drawn.logprobs, np.log([np.exp(4) / (np.exp(1) + 2 * np.exp(4)), 1 / 3]), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 11, 2**32 - 1, 2**40 + 5])
def test_the_random_key_is_that_of_the_seed(seed) -> None:
    """Of its low 32 bits."""
    key = sampling_values(SamplingParams(seed=seed), ()).key
    expected = jax.random.key(np.uint32(seed & 0xFFFFFFFF), impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))
    assert key.dtype == expected.dtype


def test_seeds(model) -> None:
    def run(seed: int, *requests: Request) -> list[list[int]]:
        with NativeEngine(model, max_slots=16, max_length=32) as engine:
            completions = engine.generate(requests, SamplingParams(max_tokens=12, seed=seed))
        return [completion.token_ids for completion in completions]

    def request(seed: int | None = None, n: int = 1) -> Request:
        return Request(prompt_ids=PROMPT, n=n, seed=seed)

    runs = [run(0, request(0)), run(1, request(0)), run(0, request(1)), run(0, request(-1)), run(2**31, request(0))]
    assert len({str(tokens) for tokens in runs}) == len(runs)
    first, second = run(0, request(), request())
    assert [first] == run(0, request(0))
    assert [second] == run(0, request(1))
    group = run(0, request(0, n=8))
    assert group[0] == first
    assert len({str(tokens) for tokens in group}) == 8
