"""Generating as on a GPU, from kernels that stand side by side and in chunks of known length: the same tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend.core
import numpy as np
import pytest
from flax import nnx

from jaxrft.models import decoder
from jaxrft.rollout import NativeEngine, SamplingParams, buckets, programs
from jaxrft.rollout.programs import Programs
from tests.jaxprs import count
from tests.rollout.tiny import EOS, own_leaves, random_model, random_requests, tokens_of

# Two whole chunks behind the first token.
DRAWN = SamplingParams(temperature=0.9, max_tokens=17, seed=5)
WHOLE = dataclasses.replace(DRAWN, ignore_eos=True)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("fp8", "bfloat16")])
def test_it_generates_the_same(quantization, dtype, monkeypatch) -> None:
    """In bfloat16 the parameters are float32, as a trainer's are."""
    check_same(monkeypatch.setattr, random_model(dtype=dtype), quantization, None, 1e-5 if dtype == "float32" else 0.05)


@pytest.mark.soak
def test_on_a_mesh(run_python) -> None:
    run_python(f"from {__name__} import check_mesh; check_mesh()", devices=4)


def check_mesh() -> None:
    from jaxrft.parallel import make_mesh, replicated

    check_same(setattr, random_model(), "none", replicated(make_mesh(2, 2)), 1e-5)


def check_same(patch, model, quantization, placement, tolerance) -> None:
    found, requests = [], random_requests(3, seed=4)
    for as_on_a_gpu in (False, True):
        programs.programs_of.cache_clear()
        patch(programs, "joins_kernels", lambda mesh, joins=as_on_a_gpu: joins)
        patch(programs, "asks_for_the_end", lambda asks=not as_on_a_gpu: asks)
        settings = {"max_slots": 8, "max_length": 32, "eos_token_ids": [EOS], "quantization": quantization}
        with NativeEngine(model, **settings) as engine:
            if placement is not None:
                engine.update_weights(jax.device_put(nnx.state(model, nnx.Param), placement), version=1)
            # With completions that end when they like, and with some that take every token of every chunk.
            found.append(engine.generate(random_requests(8, seed=2), DRAWN) + engine.generate(requests, WHOLE))
    programs.programs_of.cache_clear()
    if tolerance < 0.01:
        assert tokens_of(found[0]) == tokens_of(found[1])
    for one, two in zip(*found):
        alike = len(one.token_ids) if one.token_ids == two.token_ids else 1
        np.testing.assert_allclose(one.logprobs[:alike], two.logprobs[:alike], atol=tolerance)


def test_products_of_a_layer() -> None:
    """Four in place of seven; the biases, the kernels of other layers and the norms stay as they are."""
    graphdef, params = nnx.split(random_model())
    leaves, treedef = jax.tree.flatten(params)
    counts = {}
    for joins in (False, True):
        made = Programs(graphdef, treedef, None, joins=joins)
        own = own_leaves(made, leaves, "float32")
        prefill = functools.partial(made._prefill_impl, shapes=buckets.PromptShapes(2, 2, 16))
        trace = jax.make_jaxpr(prefill)(own, np.zeros((2, 16), np.int32), np.full(2, 16, np.int32))
        counts[joins] = count(trace.jaxpr, "dot_general")
    # Of two layers, their attention's own two products each, and the output projection.
    assert counts == {False: 2 * (7 + 2) + 1, True: 2 * (4 + 2) + 1}


def test_caches_of_one_length_where_a_kernel_reads_what_a_slot_has(monkeypatch) -> None:
    """By the kernel, interpreted: the same completions, from one program for chunks and none that resizes."""
    # First come short prompts, then long ones.
    model, requests = random_model(), random_requests(4, longest=3) + random_requests(2, seed=4, longest=45)
    monkeypatch.setattr(buckets, "SMALLEST_CACHE", 16)
    settings = {"max_slots": 4, "max_length": 70, "eos_token_ids": [EOS]}
    found, names = [], []
    for kernel in ("dense", "triton_decode"):
        programs.programs_of.cache_clear()
        monkeypatch.setattr(decoder, "choose_decode", lambda wanted, use, kernel=kernel: kernel)
        with NativeEngine(model, **settings) as engine:
            found.append(engine.generate(requests, DRAWN))
            names.append([name for name, *_ in engine._programs.compiled])
    programs.programs_of.cache_clear()
    assert tokens_of(found[0]) == tokens_of(found[1])
    for one, two in zip(*found):
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)
    assert names[0].count("decode") > 1
    assert "resize" in names[0]
    assert [names[1].count(name) for name in ("begin", "decode", "resize")] == [1, 1, 0]
    # Whole blocks of the kernel.
    assert [key[:3] for key in engine._programs.compiled if key[0] == "begin"] == [("begin", 4, 128)]
