"""Slots on the device: what is known of each, and the pure functions that change it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrft.rollout.sampling import Draw, Mode, SamplingValues, draw

# A models.layers.LayerCache: keys and values, each [slots, kv_heads, length, head_dim].
Cache = Any


class SlotState(NamedTuple):
    """What the device knows of each slot. Donated to every program that changes it.

    Attributes:
        newest: last token drawn, with its log-probabilities; not yet in the caches.
        positions: where the newest token stands, counted from the prompt's start.
        produced: tokens drawn, the newest included.
        limits: tokens that may be drawn at most.
        keys: random key of the slot's completion.
        done: nothing more is drawn.
    """

    newest: Draw
    positions: Int[Array, "slots"]
    produced: Int[Array, "slots"]
    limits: Int[Array, "slots"]
    keys: Key[Array, "slots"]
    done: Bool[Array, "slots"]


class Placement(NamedTuple):
    """Which slots take which prompt; int32 NumPy arrays.

    Attributes:
        row: the prompt's row in :class:`Prefilled`; -1 leaves the slot as it is.
        length: tokens of the prompt.
        limit: tokens that may be drawn at most.
        seed: the request's seed, its 32 bits read as a signed integer.
        sample: the completion's place in its group.
    """

    row: Int[np.ndarray, "slots"]
    length: Int[np.ndarray, "slots"]
    limit: Int[np.ndarray, "slots"]
    seed: Int[np.ndarray, "slots"]
    sample: Int[np.ndarray, "slots"]


def empty_state(key: Key[Array, ""], *, slots: int) -> SlotState:
    """Slots that are all done."""

    def zeros(dtype=jnp.int32):
        return jnp.zeros((slots,), dtype)

    newest = Draw(zeros(), zeros(jnp.float32), zeros(jnp.float32))
    keys = jnp.broadcast_to(key, (slots,))
    return SlotState(newest, zeros(), zeros(), zeros(), keys, jnp.ones((slots,), bool))


def place(
    state: SlotState, logits: Float[Array, "slots vocab"], placement: Placement, values: SamplingValues, *, mode: Mode
) -> SlotState:
    """Starts completions: draws each one's first token from the logits of its prompt."""
    taken = placement.row >= 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(values.key, placement.seed.astype(jnp.uint32))
    keys = jax.vmap(jax.random.fold_in)(keys, placement.sample)
    none = jnp.zeros_like(placement.row)
    drawn = draw(logits, keys, none, values.first_temperature, values, mode)
    done = is_stop(drawn.tokens, values) | (placement.limit <= 1)
    length, limit = jnp.asarray(placement.length), jnp.asarray(placement.limit)
    new = SlotState(drawn, length, none + 1, limit, keys, done)
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, state)


def in_blocks(
    prompts: Float[Array, "prompts kv_heads time head_dim"], block: int
) -> Float[Array, "blocks kv_heads block head_dim"]:
    """Keys or values of prompts, cut into blocks of tokens: those of one prompt after those of another."""
    count, kv_heads, _, head_dim = prompts.shape
    return prompts.reshape(count, kv_heads, -1, block, head_dim).swapaxes(1, 2).reshape(-1, kv_heads, block, head_dim)


def padded(array: Float[Array, "rows ..."], rows: int) -> Float[Array, "all ..."]:
    """An array with zeros behind its rows, so that there are ``rows``."""
    return jnp.concatenate([array, jnp.zeros((rows - array.shape[0], *array.shape[1:]), array.dtype)])


def copy_prompts(caches: list[Cache], prompts: list[Cache], each: Int[Array, ""], placement: Placement) -> list[Cache]:
    """Caches with prompts at the start of the slots that take one, as far as the longest of these goes.

    Args:
        prompts: blocks of tokens, as :func:`in_blocks` gives them.
        each: blocks of a prompt.
        placement: which prompt each slot takes.
    """
    block, length = prompts[0].key.shape[2], caches[0].key.shape[2]
    taken, first = placement.row >= 0, jnp.maximum(placement.row, 0) * each
    tokens = jnp.where(taken, placement.length, 0)

    def put(caches: list[Cache], number, size: int) -> list[Cache]:
        """The first ``size`` tokens of one block of every prompt that has it."""
        start = number * block
        has = (tokens > start)[:, None, None, None]

        def one(cache, prompts):
            shape = (cache.shape[0], cache.shape[1], size, cache.shape[3])
            new = prompts[jnp.where(tokens > start, first + number, 0), :, :size]
            old = jax.lax.dynamic_slice(cache, (0, 0, start, 0), shape)
            # .at[].set() would be a scatter, which is slow to compile and to run.
            return jax.lax.dynamic_update_slice(cache, jnp.where(has, new, old), (0, 0, start, 0))

        return jax.tree.map(one, caches, prompts)

    # Blocks that no slot needs are left out: prompts may be far shorter than they are allowed to be. A program for each
    # number of blocks, in place of a loop, would spare a GPU's host up to five looks whether there is another.
    if whole := length // block:
        needed = jnp.minimum(-(-jnp.max(tokens) // block), whole)
        caches = jax.lax.fori_loop(0, needed, lambda number, caches: put(caches, number, block), caches)
    return put(caches, whole, length % block) if length % block else caches


def resize(cache: Cache, *, length: int) -> Cache:
    """One layer's cache for ``length`` tokens, with the same content as far as it goes."""

    def one(cache):
        slots, kv_heads, old, head_dim = cache.shape
        if length < old:
            return cache[:, :, :length]
        # Two axes: XLA has a fast path for these, and compiles it six times faster than a pad of four.
        tail = jnp.zeros((slots * kv_heads, (length - old) * head_dim), cache.dtype)
        joined = jnp.concatenate([cache.reshape(slots * kv_heads, -1), tail], axis=1)
        return joined.reshape(slots, kv_heads, length, head_dim)

    return jax.tree.map(one, cache)


def advance(state: SlotState, drawn: Draw, values: SamplingValues) -> SlotState:
    """Takes the drawn tokens where a slot is not done.

    One that is done is computed along with the others, at its first place: behind its last there may be no cache.
    """
    produced = state.produced + ~state.done
    done = state.done | is_stop(drawn.tokens, values) | (produced >= state.limits)
    positions = jnp.where(done, 0, state.positions + 1)
    return state._replace(newest=drawn, positions=positions, produced=produced, done=done)


def is_stop(tokens: Int[Array, "slots"], values: SamplingValues) -> Bool[Array, "slots"]:
    """Which tokens end a completion."""
    return (tokens[:, None] == values.stop_ids).any(-1)
