"""Drawing tokens from logits: pure functions over one row of logits per sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jaxrft.rollout.records import SamplingParams

# Explicit, so that completions do not depend on JAX's configured default generator.
PRNG = "threefry2x32"
# Tokens that are drawn from at a time. It divides the vocabularies of most models.
BLOCK = 128


class Mode(NamedTuple):
    """What a compiled program of drawing does; each combination is a program of its own."""

    greedy: bool
    truncate: bool
    forbid_stops: bool


class SamplingValues(NamedTuple):
    """The numbers of :class:`SamplingParams`, as arrays that programs take."""

    key: Key[Array, ""]
    temperature: Float[Array, ""]
    first_temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    min_tokens: Int[Array, ""]
    stop_ids: Int[Array, "stops"]


class Draw(NamedTuple):
    """Drawn tokens, their log-probabilities before truncation and of the distribution drawn from."""

    tokens: Int[Array, "rows"]
    logprobs: Float[Array, "rows"]
    sampled_logprobs: Float[Array, "rows"]


def sampling_values(params: SamplingParams, eos_ids: tuple[int, ...]) -> SamplingValues:
    """Puts ``params`` on the device; stop tokens are padded with -1 to 4, 8, 16, ..., so that shapes stay few."""
    stops = stop_token_ids(params, eos_ids)
    first = params.temperature if params.first_token_temperature is None else params.first_token_temperature
    padded = np.full(max(4, 1 << max(len(stops) - 1, 0).bit_length()), -1, np.int32)
    padded[: len(stops)] = stops
    numbers = (
        np.float32(params.temperature),
        np.float32(first),
        np.int32(min(params.top_k, np.iinfo(np.int32).max)),
        np.float32(params.top_p),
        np.float32(params.min_p),
        np.int32(params.min_tokens),
        padded,
    )
    # What jax.random.key gives, which two programs would compute.
    words = jax.device_put(np.array([0, params.seed & 0xFFFFFFFF], np.uint32))
    key = jax.random.wrap_key_data(words, impl=PRNG)
    return SamplingValues(key, *jax.device_put(numbers))


def eos_ids_of(tokenizer: Any) -> tuple[int, ...]:
    """A tokenizer's end-of-sequence token, where it has one."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)


def stop_token_ids(params: SamplingParams, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Every token that ends a completion, in order, each once."""
    return tuple(sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}))


def modes(params: SamplingParams) -> tuple[Mode, Mode]:
    """How the first token of a completion is drawn, and how the others are."""
    truncate = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    greedy = params.temperature == 0
    first_greedy = greedy and params.first_token_temperature is None
    forbid = params.min_tokens > 0
    return (
        Mode(first_greedy, truncate and not first_greedy, forbid),
        Mode(greedy, truncate and not greedy, params.min_tokens > 1),
    )


def draw(
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, "rows"],
    index: Int[Array, "rows"],
    temperature: Float[Array, ""],
    values: SamplingValues,
    mode: Mode,
) -> Draw:
    """Draws one token a row.

    Args:
        logits: float32.
        keys: one for each completion.
        index: how many tokens the completion has already: a token's randomness depends on its key and
            index alone.
        temperature: of this token; of no effect where greedy.
        values, mode: how to draw; see :class:`SamplingParams` for the order of the steps.
    """
    # A GPU's compiler would divide at the end of the product, which for cuBLAS is one more pass over the logits. Behind
    # the barrier each of the passes below divides what it reads.
    logits = jax.lax.optimization_barrier(logits)
    scaled = logits if mode.greedy else logits / temperature
    kept = forbid_stops(scaled, index, values) if mode.forbid_stops else scaled
    if mode.truncate:
        kept = truncate(kept, values.top_k, values.top_p, values.min_p)
    if mode.greedy:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
        return Draw(tokens, _logprob(scaled, tokens), jnp.zeros(tokens.shape, jnp.float32))
    tokens, log_norm = categorical(kept, keys, index)
    sampled = _chosen(kept, tokens) - log_norm
    changed = mode.truncate or mode.forbid_stops
    return Draw(tokens, _logprob(scaled, tokens) if changed else sampled, sampled)


def categorical(
    logits: Float[Array, "rows vocab"], keys: Key[Array, "rows"], index: Int[Array, "rows"]
) -> tuple[Int[Array, "rows"], Float[Array, "rows"]]:
    """One draw of each row's softmax, and the log of the row's sum of exponentials.

    Gumbel-max twice: the largest of log-probability plus Gumbel noise is a draw, of blocks of the vocabulary first,
    then of the drawn block's tokens. So a row takes a random number for each block and for each token of one; with one
    for each of all tokens, these would take longer than the passes over the logits.

    Args:
        logits: float32; minus infinity for what must not be drawn, but not for all.
        keys, index: of the randomness, as of :func:`draw`.
    """
    rows, vocab = logits.shape
    size = min(BLOCK, vocab)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, size)
    sums = jax.nn.logsumexp(blocks, axis=-1)
    # A single block is not drawn.
    choices = sums.shape[1] if sums.shape[1] > 1 else 0

    def noise_of(key, i):
        return jax.random.gumbel(jax.random.fold_in(key, i), (size + choices,))

    noise = jax.vmap(noise_of)(keys, index)
    block = jnp.argmax(sums + noise[:, size:], axis=-1) if choices else jnp.zeros(rows, jnp.int32)
    # Not by an array of rows: where devices share out the rows, they would ask each other.
    drawn = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(drawn + noise[:, :size], axis=-1)
    return (block * size + place).astype(jnp.int32), jax.nn.logsumexp(sums, axis=-1)


def forbid_stops(
    logits: Float[Array, "rows vocab"], index: Int[Array, "rows"], values: SamplingValues
) -> Float[Array, "rows vocab"]:
    """Takes stop tokens out of the rows that have fewer than ``min_tokens`` tokens."""
    is_stop = (jnp.arange(logits.shape[-1])[:, None] == values.stop_ids).any(-1)
    return jnp.where(is_stop & (index < values.min_tokens)[:, None], -jnp.inf, logits)


def truncate(
    logits: Float[Array, "rows vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""], min_p: Float[Array, ""]
) -> Float[Array, "rows vocab"]:
    """Puts the tokens that top-k, then top-p, then min-p leave out at minus infinity.

    Nothing is sorted: the smallest logit that stays is found bit by bit, in 32 passes over the row.
    """
    order = _order_preserving_bits(logits)
    count = jnp.where(top_k == 0, logits.shape[-1], top_k)
    kept = jnp.where(order >= _largest_reaching(order, lambda inside: inside.sum(-1) >= count), logits, -jnp.inf)
    probability = jax.nn.softmax(kept, axis=-1)
    nucleus = _largest_reaching(order, lambda inside: jnp.where(inside, probability, 0.0).sum(-1) >= top_p)
    # Rounding may let the sum reach 1 before the last token.
    kept = jnp.where((order >= nucleus) | (top_p >= 1), kept, -jnp.inf)
    floor = kept.max(-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(kept >= floor, kept, -jnp.inf)


def _largest_reaching(
    order: UInt[Array, "rows vocab"], reached: Callable[[Bool[Array, "rows vocab"]], Bool[Array, "rows"]]
) -> UInt[Array, "rows 1"]:
    """The largest threshold whose set ``order >= threshold`` still is ``reached``; 0 where none is."""

    def try_bit(step, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(reached(order >= candidate)[:, None], candidate, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((order.shape[0], 1), jnp.uint32))


def _order_preserving_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Maps float32 to integers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _chosen(logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows"]) -> Float[Array, "rows"]:
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _logprob(logits: Float[Array, "rows vocab"], tokens: Int[Array, "rows"]) -> Float[Array, "rows"]:
    return _chosen(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)
