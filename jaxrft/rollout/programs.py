"""The compiled programs of the native engine.

A round of the engine is: ``prefill`` some prompts, ``admit`` them to free slots (draws each completion's
first token, and copies the prompt's keys and values there), ``resize`` the caches to the bucket that the
longest live slot needs, ``decode`` a chunk of tokens.

The caches are as long as what is attended to, not as the longest completion there may be: a chunk reads
no more than it must, needs no second copy of the part it reads, and holds no memory for tokens to come.

Programs take the model's parameters as a flat tuple of arrays, so that a call does not walk the module's
state in Python. Kernels may be quantised, each of which is two arrays, or joined.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxrft.parallel import Layout
from jaxrft.rollout.buckets import PromptShapes
from jaxrft.rollout.sampling import Mode, SamplingValues, draw
from jaxrft.rollout.slots import (
    Cache,
    Placement,
    SlotState,
    advance,
    copy_prompts,
    empty_state,
    in_blocks,
    padded,
    place,
    resize,
)
from jaxrft.rollout.weights import Leaf, own_copy

logger = logging.getLogger(__name__)

# One a layer, in a list: stacked, every step would copy them.
Caches = list[Cache]


class Prefilled(NamedTuple):
    """Prompts ready to be copied into slots; of one of two shapes, whatever their number and lengths.

    Attributes:
        logits: of the first token of each.
        caches: keys and values, each [blocks, kv_heads, block, head_dim]: one prompt's blocks after another's.
        each: blocks of a prompt.
    """

    logits: Float[Array, "rows vocab"]
    caches: Caches
    each: Int[Array, ""]


class Programs:
    """Jitted functions of one model; shared by all engines of that model's shape.

    Args:
        graphdef, treedef: the model and its parameters, without arrays.
        mesh: devices that the parameters lie on, which share out slots and heads; None: one device.
        quantization: of the engine's copy of the kernels, ``none`` or ``fp8``.
        joins: whether that copy has kernels with the same input side by side.

    Attributes:
        compiled: name, shapes and static arguments of every program that was compiled.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        treedef: Any,
        mesh: Mesh | None,
        quantization: str = "none",
        joins: bool = False,
    ):
        self._graphdef, self._treedef = graphdef, treedef
        self._quantizes, self._joins = quantization == "fp8", joins
        self._layout = None if mesh is None else Layout(mesh, decoding=True)
        self.compiled: set[tuple[Any, ...]] = set()
        self._begin = jax.jit(self._begin_impl, static_argnames=("slots", "length", "dtype"))
        self._prefill = jax.jit(self._prefill_impl, static_argnames="shapes")
        self._admit = jax.jit(self._admit_impl, static_argnames="mode", donate_argnames=("state", "caches"))
        self._resize = jax.jit(self._resize_impl, static_argnames="length")
        self._decode = jax.jit(
            self._decode_impl,
            static_argnames=("steps", "mode"),
            donate_argnames=("state", "caches"),
            compiler_options=_decode_options(),
        )

    def begin(
        self, leaves: tuple[Array, ...], values: SamplingValues, *, slots: int, length: int, dtype: Any
    ) -> tuple[tuple[Leaf, ...], SlotState, Caches]:
        """What a rollout starts from.

        Returns:
            The parameters, with the model's matrices in the type that it computes in, where they are kept in another;
            quantised, joined. Cast where they are used, they would be read in the wider type at every chunk of tokens.
            Then slots with nothing in them, and caches of ``length`` tokens for each.
        """
        key, statics = ("begin", slots, length, dtype), {"slots": slots, "length": length, "dtype": dtype}
        own, state, caches = self._call(key, self._begin, leaves, values.key, **statics)
        # What a program hands through, it copies.
        return tuple(leaf if new is None else new for new, leaf in zip(own, leaves, strict=True)), state, caches

    def prefill(
        self,
        leaves,
        tokens: Int[np.ndarray, "prompts time"],
        lengths: Int[np.ndarray, "prompts"],
        shapes: PromptShapes,
    ) -> Prefilled:
        """Runs right-padded prompts, which are of one of some shapes."""
        return self._call(
            ("prefill", *tokens.shape, *dataclasses.astuple(shapes)),
            self._prefill,
            leaves,
            tokens,
            lengths,
            shapes=shapes,
        )

    def admit(
        self,
        state: SlotState,
        caches: Caches,
        prompts: Prefilled,
        placement: Placement,
        values: SamplingValues,
        mode: Mode,
    ) -> tuple[SlotState, Caches]:
        """Starts completions in slots: draws the first token of each, and copies what its prompt left to the caches.

        What of ``prompts`` is past the end of ``caches`` is left out: it must be padding.
        """
        shapes = prompts.logits.shape, prompts.caches[0].key.shape, caches[0].key.shape
        key = ("admit", *itertools.chain(*shapes), values.stop_ids.size, mode)
        return self._call(key, self._admit, state, caches, prompts, placement, values, mode=mode)

    def resize(self, caches: Caches, length: int) -> Caches:
        """Caches of ``length`` tokens with the same content. Consumes the list: only one layer is there twice."""
        key = ("resize", *caches[0].key.shape, length)
        for index, cache in enumerate(caches):
            caches[index] = self._call(key, self._resize, cache, length=length)
        return caches

    def decode(
        self,
        leaves,
        state: SlotState,
        caches: Caches,
        ended: Bool[np.ndarray, "slots"],
        values: SamplingValues,
        *,
        steps: int,
        mode: Mode,
    ) -> tuple[SlotState, Caches, Int[Array, "rows slots"]]:
        """Draws up to ``steps`` tokens for every slot that is neither done nor ``ended``.

        Returns:
            The new state and caches, and one int32 array for the host: ``steps + 1`` rows of tokens (row 0
            holds those that were the newest at the start), as many of log-probabilities and of sampled
            log-probabilities (their float32 bits), then tokens produced, then whether the slot is done.
        """
        key = ("decode", *caches[0].key.shape, values.stop_ids.size, steps, mode)
        return self._call(key, self._decode, leaves, state, caches, ended, values, steps=steps, mode=mode)

    def _call(self, key: tuple[Any, ...], program: Callable[..., Any], *arguments: Any, **statics: Any) -> Any:
        if key in self.compiled:
            return program(*arguments, **statics)
        start = time.perf_counter()
        result = program(*arguments, **statics)
        self.compiled.add(key)
        logger.info("compiled %s in %.2f s", " ".join(str(part) for part in key), time.perf_counter() - start)
        return result

    def _model(self, leaves: tuple[Leaf, ...]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _traced(self) -> AbstractContextManager[Any]:
        """The context in which the model's code is traced."""
        return contextlib.nullcontext() if self._layout is None else self._layout.use()

    def _begin_impl(self, leaves, key, *, slots, length, dtype):
        copies = self._quantizes or self._joins or any(leaf.ndim > 1 and leaf.dtype != dtype for leaf in leaves)
        own: tuple[Leaf | None, ...] = (None,) * len(leaves)
        if copies:
            with self._traced():
                params = jax.tree.unflatten(self._treedef, leaves)
                own = own_copy(params, dtype, quantizes=self._quantizes, joins=self._joins)
        # Of the model's shapes alone: those of its own copy are the same.
        state, caches = empty_state(key, slots=slots), self._model(leaves).init_cache(slots, length)
        return own, *self._share_out((state, caches))

    def _admit_impl(self, state, caches, prompts, placement, values, *, mode):
        logits = prompts.logits[jnp.maximum(placement.row, 0)]
        state = place(state, logits, placement, values, mode=mode)
        caches = copy_prompts(caches, prompts.caches, prompts.each, placement)
        return self._share_out((state, caches))

    def _resize_impl(self, cache, *, length):
        return self._share_out(resize(cache, length=length))

    def _prefill_impl(self, leaves, tokens, lengths, *, shapes):
        with self._traced():
            model = self._model(leaves)
            hidden, caches = model.prefill(*self._share_out((tokens, lengths)))
            each = tokens.shape[1] // shapes.block
            rows, blocks = shapes.kept(tokens.shape[0], each)
            logits = padded(model.logits(hidden), rows)
            caches = jax.tree.map(lambda x: padded(in_blocks(x, shapes.block), blocks), caches)
            return self._share_out(Prefilled(logits, caches, jnp.int32(each)))

    def _decode_impl(self, leaves, state, caches, ended, values, *, steps, mode):
        window = caches[0].key.shape[2]
        done = state.done | ended
        # A slot that is done is computed at its first place, as in ``advance``.
        state = state._replace(done=done, positions=jnp.where(done, 0, state.positions))
        log = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps + 1, *x.shape)), state.newest)

        asks = asks_for_the_end()

        def unfinished(carry):
            step, state, _, _ = carry
            return (step < steps) & ~state.done.all() if asks else step < steps

        def one_token(carry):
            step, state, caches, log = carry
            model = self._model(leaves)
            hidden, caches = model.decode(state.newest.tokens, state.positions, caches, window)
            drawn = draw(model.logits(hidden), state.keys, state.produced, values.temperature, values, mode)
            log = jax.tree.map(lambda rows, x: jax.lax.dynamic_update_index_in_dim(rows, x, step + 1, 0), log, drawn)
            return step + 1, advance(state, drawn, values), caches, log

        carry = (jnp.int32(0), state, caches, log)
        with self._traced():
            _, state, caches, log = jax.lax.while_loop(unfinished, one_token, carry)
        floats = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (log.logprobs, log.sampled_logprobs)]
        packed = jnp.concatenate([log.tokens, *floats, state.produced[None], state.done[None].astype(jnp.int32)])
        return self._share_out(state), self._share_out(caches), packed

    def _share_out(self, tree: Any) -> Any:
        """Splits first axes over the devices that take rows, and caches over those that take heads."""
        layout = self._layout
        if layout is None:
            return tree

        def sharding(x: jax.Array) -> NamedSharding:
            axes = ("batch", "kv_heads", None, None) if x.ndim == 4 else ("batch",) + (None,) * (x.ndim - 1)
            return layout.named(layout.activation(axes, x.shape))

        return jax.lax.with_sharding_constraint(tree, jax.tree.map(sharding, tree))


def joins_kernels(mesh: Mesh | None) -> bool:
    """Whether an engine joins kernels: a GPU's is faster by it. Devices that share out their outputs cannot."""
    return jax.default_backend() != "cpu" and (mesh is None or mesh.shape["tensor"] == 1)


def asks_for_the_end() -> bool:
    """Whether a chunk ends where all slots are done, which is asked after each token.

    A GPU's host would wait for each answer before it sends the next token's work, and the GPU for the host: there all
    tokens of a chunk are decoded.
    """
    return jax.default_backend() == "cpu"


def _decode_options() -> dict[str, Any] | None:
    """XLA's, of the loop over tokens.

    A GPU's compiler makes one product of several with the same input, and to that end puts their kernels side by side:
    for every token anew, so that most of the weights would be read twice and written once.
    """
    return None if jax.default_backend() == "cpu" else {"xla_gpu_dot_merger_threshold_mb": 0}


@functools.lru_cache(maxsize=8)
def programs_of(graphdef: nnx.GraphDef, treedef: Any, mesh: Mesh | None, quantization: str = "none") -> Programs:
    """The programs of a model; made once for all engines of its shape on these devices."""
    return Programs(graphdef, treedef, mesh, quantization, joins=joins_kernels(mesh))
