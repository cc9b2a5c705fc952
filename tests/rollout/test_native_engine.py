"""Slots, groups, chunks and buckets change nothing in a completion."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrft.models import Decoder
from jaxrft.models.layers import LayerCache
from jaxrft.rollout import NativeEngine, Request, SamplingParams, buckets, programs, scheduler, slots
from jaxrft.rollout.buckets import PromptShapes
from jaxrft.rollout.programs import Programs
from jaxrft.rollout.sampling import modes, sampling_values
from jaxrft.rollout.slots import Placement
from tests.rollout.tiny import EOS, SPEC, VOCAB, own_leaves, random_model, random_requests, tokens_of


@pytest.fixture(autouse=True)
def short_caches(monkeypatch):
    """Caches grow within the few tokens that a test generates."""
    monkeypatch.setattr(buckets, "SMALLEST_CACHE", 16)


SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=18, seed=4, min_tokens=2)


def generate(model, requests, sampling=SAMPLING, **options):
    with NativeEngine(model, **{"max_slots": 8, "max_length": 32, "eos_token_ids": [EOS], **options}) as engine:
        return engine.generate(requests, sampling)


@pytest.mark.parametrize(
    "options",
    [
        {"max_slots": 1, "decode_chunk": 3},  # each alone
        {"max_slots": 3, "decode_chunk": 1},  # groups of 4 are split over several rounds
        {"max_slots": 64, "max_prefill_tokens": 40},
    ],
    ids=str,
)
def test_completions_do_not_depend_on_what_is_beside_them(model, options) -> None:
    requests = random_requests(10, seed=3)
    order = np.random.default_rng(0).permutation(len(requests))
    completions = generate(model, requests)
    starts = np.cumsum([0, *(request.n for request in requests)])
    expected = [completions[starts[i] + sample] for i in order for sample in range(requests[i].n)]
    shuffled = generate(model, [requests[i] for i in order], **options)
    assert tokens_of(shuffled) == tokens_of(expected)
    assert len({len(completion.token_ids) for completion in completions}) > 5
    for one, other in zip(shuffled, expected):
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=1e-5)


def test_a_prompt_runs_once_for_its_group(model, monkeypatch) -> None:
    prefilled = []
    prefill = Programs.prefill

    def counted(self, leaves, tokens, lengths, shapes):
        prefilled.append(lengths)
        return prefill(self, leaves, tokens, lengths, shapes)

    monkeypatch.setattr(Programs, "prefill", counted)
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    prompts = [request.prompt_ids for request in random_requests(2, seed=8)]
    grouped = generate(model, [Request(prompt_ids=prompt, n=19) for prompt in prompts], greedy)
    assert [len(lengths) for lengths in prefilled] == [1, 1]
    separate = generate(model, [Request(prompt_ids=prompt) for prompt in prompts for _ in range(19)], greedy)
    assert tokens_of(grouped) == tokens_of(separate)


def test_a_completion_ends_where_the_slot_is_full(model) -> None:
    sampling = SamplingParams(max_tokens=500, ignore_eos=True)
    requests = [Request(prompt_ids=[1] * length) for length in (1, 20, 31)]
    completions = generate(model, requests, sampling)
    assert [len(completion.token_ids) for completion in completions] == [31, 12, 1]
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_max_tokens_of_one_and_progress(model) -> None:
    requests = random_requests(9, seed=5)
    longer = generate(model, requests)
    seen: list[tuple[int, int]] = []
    with NativeEngine(model, max_slots=8, max_length=32, eos_token_ids=[EOS]) as engine:
        short = engine.generate(
            requests,
            SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1, seed=4, min_tokens=1),
            on_progress=lambda done, total: seen.append((done, total)),
        )
        assert engine.generate([], SAMPLING) == []
    assert tokens_of(short) == [completion.token_ids[:1] for completion in longer]
    total = len(longer)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("options", [{"max_slots": 3, "decode_chunk": 1}, {"max_slots": 64}], ids=str)
def test_groups_are_told_of_as_they_are_finished(model, options) -> None:
    """Each once and whole, in the order in which they end, before others have ended."""
    requests = random_requests(10, seed=3)
    told: list[tuple[int, list[Any]]] = []
    progress: list[tuple[int, int]] = []
    with NativeEngine(model, max_length=32, eos_token_ids=[EOS], **options) as engine:
        completions = engine.generate(
            requests,
            SAMPLING,
            lambda done, total: progress.append((len(told), done)),
            lambda place, group: told.append((place, group)),
        )
    starts = np.cumsum([0, *(request.n for request in requests)])
    places = [place for place, _ in told]
    assert sorted(places) == list(range(10)) != places
    for place, group in told:
        assert all(a is b for a, b in zip(group, completions[starts[place] : starts[place + 1]], strict=True))
    # At every look as many groups are known as can be with the completions that have ended.
    assert any(0 < groups < 10 for groups, _ in progress)
    assert progress[-1] == (10, len(completions))


def test_stop_token_ids_and_ignore_eos(model) -> None:
    requests = random_requests(8, seed=6)
    free = generate(model, requests, SamplingParams(max_tokens=18, ignore_eos=True))
    stopped = generate(model, requests, SamplingParams(max_tokens=18, stop_token_ids=(8, 12)))
    for whole, cut in zip(free, stopped):
        ends = [place for place, token in enumerate(whole.token_ids) if token in (EOS, 8, 12)]
        assert cut.token_ids == whole.token_ids[: ends[0] + 1 if ends else 18]
        assert cut.finish_reason == ("stop" if ends else "length")
    assert any(EOS in whole.token_ids for whole in free)


def test_the_first_stop_is_right_after_min_tokens(model) -> None:
    sampling = dataclasses.replace(SAMPLING, stop_token_ids=(8, 12))
    completions = generate(model, [Request(prompt_ids=[2, 5], n=64)], sampling)
    stopped = [len(completion.token_ids) for completion in completions if completion.finish_reason == "stop"]
    assert min(stopped) == SAMPLING.min_tokens + 1


def test_generates_from_the_weights_after_a_donated_step(model) -> None:
    graphdef, params = nnx.split(random_model(7))
    requests = random_requests(4)
    with NativeEngine(nnx.merge(graphdef, params), max_slots=8, max_length=32) as engine:
        before = engine.generate(requests, SAMPLING)
        step = jax.jit(lambda params: jax.tree.map(lambda x: 0.7 * x, params), donate_argnums=0)
        new = step(params)
        with pytest.raises(RuntimeError, match="weights were deleted.*update_weights"):
            engine.generate(requests, SAMPLING)
        engine.update_weights(new, version=5)
        after = engine.generate(requests, SAMPLING)
    with NativeEngine(nnx.merge(graphdef, new), max_slots=8, max_length=32) as fresh:
        assert tokens_of(after) == tokens_of(fresh.generate(requests, SAMPLING))
    assert tokens_of(after) != tokens_of(before)
    assert {completion.versions for completion in before} == {((0, 0),)}
    assert {completion.versions for completion in after} == {((0, 5),)}


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """One entry each time that JAX traces a program of the engine: once for each that it compiles."""
    traced: list[None] = []
    method = getattr(Programs, name)

    @functools.wraps(method)
    def traced_method(self: Programs, *arguments: Any, **statics: Any) -> Any:
        traced.append(None)
        return method(self, *arguments, **statics)

    monkeypatch.setattr(Programs, name, traced_method)
    return traced


def test_programs_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is honest, ragged loads stay within the buckets, and what was seen before compiles nothing."""
    decodes, prefills = counting(monkeypatch, "_decode_impl"), counting(monkeypatch, "_prefill_impl")
    model = random_model(spec=dataclasses.replace(SPEC, num_layers=1, intermediate_size=8))  # no other test's programs
    rng = np.random.default_rng(0)
    with NativeEngine(model, max_slots=2, max_length=24, max_prompt_length=20) as engine:
        for seed in range(12):
            requests = random_requests(int(rng.integers(1, 6)), seed=seed, longest=20, largest=3)
            sampling = SamplingParams(max_tokens=int(rng.integers(1, 12)), seed=seed)
            engine.generate(requests, sampling)
        compiled, count = engine._programs.compiled, engine.compilations
        assert count == len(compiled)
        names = [key[0] for key in compiled]
        assert names.count("decode") == len(decodes) > 0
        assert names.count("prefill") == len(prefills) > 0
        # 1 or 2 slots; caches of 16 or 32 tokens; 1 or 2 prompts of 16 or 32, of 1 or 2 at most.
        assert names.count("decode") <= 4
        assert names.count("prefill") <= 6
        assert names.count("admit") <= 8
        assert names.count("begin") <= 4
        engine.generate(requests, dataclasses.replace(sampling, seed=100, temperature=0.3))
        assert engine.compilations == count


def test_prompts_are_run_in_few_shapes() -> None:
    """Whatever waits: of three lengths, no more tokens together than may be, no two calls where one would do."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        count, n, longest, most = (int(2 ** rng.uniform(0, k)) for k in (8, 4, 10, 14))
        lengths = rng.integers(1, rng.integers(1, longest + 1) + 1, rng.integers(1, 90))
        requests = [Request(prompt_ids=[1] * int(length), n=n) for length in lengths]
        shapes = PromptShapes.for_requests(requests, slots=count, longest=longest, max_length=2048, max_tokens=most)
        scheduled = scheduler.Scheduler(
            requests, SAMPLING, slots=count, max_length=2048, stop_ids=(), decode=None, version=0
        )
        while scheduled.queue:
            groups = scheduled.next_prompts(shapes)
            rows, time = scheduler.pad_prompts(groups, shapes)[0].shape
            assert time in (shapes.block, 2 * shapes.block, 4 * shapes.block)
            assert time < 2 * max(len(group.prompt) for group in groups) + 16 or time == shapes.block
            assert time < 2 * longest + 16
            assert rows <= shapes.rows
            single = shapes.each(longest) * shapes.block
            assert rows * time <= shapes.blocks * shapes.block <= max(most, single)
            kept = shapes.kept(rows, time // shapes.block)
            assert rows <= kept[0] <= shapes.rows
            assert rows * time // shapes.block <= kept[1] <= shapes.blocks
            if rows == 1 and shapes.rows >= 8:
                # One that waited alone is not copied as if it were many.
                assert kept[0] <= shapes.rows / 8
                assert kept[1] <= max(shapes.blocks / 8, 4)
            together, length, freed = len(groups), max(len(group.prompt) for group in groups), False
            while groups:
                scheduled.place(groups)
                if groups or not len(scheduled.free):
                    # Some completions end.
                    scheduled._owner[rng.random(count) < 0.3], freed = scheduler.EMPTY, True
                elif scheduled.queue and not freed:
                    # There was room for another: one call more, as it would not have fitted half of the tokens.
                    length, more = max(length, len(scheduled.queue[0].prompt)), buckets.power_of_two(together + 1)
                    assert more > shapes.rows or more * shapes.each(length) * shapes.block > (most - shapes.block) / 2
            if not len(scheduled.free):
                scheduled._owner[rng.integers(count)] = scheduler.EMPTY


def test_few_that_waited_are_put_into_slots_by_a_program_of_their_own(model) -> None:
    """Two in all, whatever waits; completions are those of an engine in which none does."""
    requests = random_requests(40, longest=12, largest=1)
    expected = tokens_of(generate(model, requests, SAMPLING, max_slots=64, max_length=32))
    programs.programs_of.cache_clear()
    options = {"max_slots": 16, "max_length": 32, "max_prompt_length": 12, "decode_chunk": 1}
    with NativeEngine(model, **options, eos_token_ids=[EOS]) as engine:
        assert tokens_of(engine.generate(requests, SAMPLING)) == expected
        admitted = {key[1] for key in engine._programs.compiled if key[0] == "admit"}
    assert admitted == {16, 2}
    programs.programs_of.cache_clear()


def test_prompts_longer_than_was_said_are_run(model) -> None:
    """As by an engine that was told nothing; some have more tokens than four of the least blocks."""
    requests, sampling = random_requests(6, longest=90), dataclasses.replace(SAMPLING, temperature=0.0)
    assert max(len(request.prompt_ids) for request in requests) > 64
    expected = tokens_of(generate(model, requests, sampling, max_length=110))
    for most in (1, 7, 30, 200):
        found = generate(model, requests, sampling, max_length=110, max_prompt_length=most, max_slots=3)
        assert tokens_of(found) == expected


def test_prompts_are_copied_as_far_as_slots_need() -> None:
    """Into caches that are no multiple of a block, or shorter than one; what is not taken stays."""
    rng = np.random.default_rng(0)
    block = 24
    for length, each, longest in [
        (80, 4, 60),
        (80, 4, 80),
        (80, 1, 9),
        (32, 2, 32),
        (16, 4, 11),
        (96, 4, 96),
        (40, 1, 1),
    ]:
        caches = [LayerCache(*rng.normal(size=(2, 5, 2, length, 3)).astype(np.float32)) for _ in range(2)]
        prompts = [LayerCache(*rng.normal(size=(2, 3, 2, each * block, 3)).astype(np.float32)) for _ in range(2)]
        row = np.array([2, -1, 0, -1, 2])
        sizes = np.array([longest, length, min(longest, 5), 3, longest])
        blocks = jax.tree.map(lambda x: slots.padded(slots.in_blocks(jnp.asarray(x), block), 14), prompts)
        placement = Placement(row, sizes, row, row, row)
        copied = jax.jit(slots.copy_prompts)(jax.tree.map(jnp.asarray, caches), blocks, np.int32(each), placement)
        for old, new, prompt in zip(*map(jax.tree.leaves, (caches, copied, prompts)), strict=True):
            for slot in range(5):
                size = sizes[slot] if row[slot] >= 0 else 0
                kept = -(-size // block) * block
                np.testing.assert_array_equal(new[slot, :, :size], prompt[row[slot], :, :size])
                np.testing.assert_array_equal(new[slot, :, kept:], old[slot, :, kept:])


def test_a_cache_is_no_shorter_than_pays(monkeypatch) -> None:
    """One length for short completions; from 128 tokens on, as long as what the longest slot has."""
    monkeypatch.setattr(buckets, "SMALLEST_CACHE", 64)
    short, long = ([buckets.cache_bucket(length, most) for length in (1, 40, 65, most)] for most in (96, 1000))
    assert short == [96] * 4
    assert long == [128, 128, 128, 1008]
    assert [buckets.cache_bucket(length, 128) for length in (1, 64, 65)] == [64, 64, 128]
    assert [buckets.whole_cache(most) for most in (2, 64, 65, 1000)] == [64, 64, 128, 1024]


@pytest.mark.parametrize(("length", "shapes"), [(2048, (2, 2, 16)), (2056, (2, 8, 16))], ids=str)
def test_caches_are_changed_in_place(length, shapes) -> None:
    """By the compiler's account: each program that changes them holds less beside them than one layer's."""
    graphdef, params = nnx.split(random_model(spec=dataclasses.replace(SPEC, num_layers=4)))
    leaves, treedef = jax.tree.flatten(params)
    made = Programs(graphdef, treedef, None)
    values, (first, mode) = sampling_values(SAMPLING, (EOS,)), modes(SAMPLING)
    _, state, caches = made.begin(leaves, values, slots=64, length=length, dtype="float32")
    prompts = made.prefill(leaves, np.zeros((2, 16), np.int32), np.full(2, 16, np.int32), PromptShapes(*shapes))
    placement = Placement(*np.zeros((len(Placement._fields), 64), np.int32))
    lowered = {
        "admit": made._admit.lower(state, caches, prompts, placement, values, mode=first),
        "decode": made._decode.lower(leaves, state, caches, np.zeros(64, bool), values, steps=4, mode=mode),
    }
    layer = sum(array.nbytes for array in caches[0])
    for name, program in lowered.items():
        held = program.compile().memory_analysis()
        assert held.alias_size_in_bytes >= len(caches) * layer, name
        # A layer's scores among it.
        assert held.temp_size_in_bytes < layer, name


def test_slots_are_shared_out_over_replicas(run_python) -> None:
    """Two devices with a copy of the weights each: the same completions, and no program is compiled twice."""
    done = run_python(
        """
        import jax
        from flax import nnx
        from jaxrft.parallel import make_mesh, replicated
        from jaxrft.rollout import NativeEngine, SamplingParams
        from tests.rollout.tiny import random_model, random_requests, tokens_of

        jax.config.update("jax_log_compiles", True)
        # Of one, two and four blocks; the longest caches are no multiple of a block.
        requests, sampling = random_requests(7, longest=60), SamplingParams(max_tokens=6, seed=1)
        graphdef, params = nnx.split(random_model())
        with NativeEngine(nnx.merge(graphdef, params), max_slots=4, max_length=72, max_prompt_length=70) as engine:
            expected = engine.generate(requests, sampling)
            engine.update_weights(jax.device_put(params, replicated(make_mesh(2))), version=1)
            completions = engine.generate(requests, sampling)
        assert tokens_of(completions) == tokens_of(expected)
        """.replace("\n        ", "\n"),
        devices=2,
    )
    # Once for each number of devices; caches grow once.
    for program in ("_admit_impl", "_decode_impl", "_begin_impl"):
        assert done.stderr.count(f"Finished XLA compilation of jit({program})") == 2


def test_each_device_has_its_slots_alone(run_python) -> None:
    """Also where devices do not divide what may be, or are more than there are completions."""
    run_python(
        """
        import jax
        from flax import nnx
        from jaxrft.parallel import make_mesh, replicated
        from jaxrft.rollout import NativeEngine, SamplingParams
        from tests.rollout.tiny import random_model, random_requests, tokens_of

        graphdef, params = nnx.split(random_model())
        for requests, most, slots in ((random_requests(7), 16, 15), (random_requests(1, largest=1), 2, 3)):
            sampling = SamplingParams(max_tokens=6, seed=1)
            with NativeEngine(nnx.merge(graphdef, params), max_slots=most, max_length=32) as engine:
                expected = engine.generate(requests, sampling)
                engine.update_weights(jax.device_put(params, replicated(make_mesh(3))), version=1)
                decode, parts = engine._programs.decode, set()

                def told(leaves, state, caches, *arguments, **options):
                    for array in (state.done, caches[0].key):
                        parts.update(part.data.shape[0] for part in array.addressable_shards)
                    return decode(leaves, state, caches, *arguments, **options)

                engine._programs.decode = told
                completions = engine.generate(requests, sampling)
                # Engines of a model share their programs.
                del engine._programs.decode
            assert tokens_of(completions) == tokens_of(expected)
            assert parts == {slots // 3}, parts
        """.replace("\n        ", "\n"),
        devices=3,
    )


def test_no_token_is_written_behind_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that fill theirs end in the middle of a chunk, while others, which began later, go on."""
    seen, decode = [], Decoder.decode

    def told(self, tokens, positions, caches, window):
        jax.debug.callback(lambda positions: seen.append((int(positions.max()), window)), positions)
        return decode(self, tokens, positions, caches, window)

    programs.programs_of.cache_clear()
    monkeypatch.setattr(Decoder, "decode", told)
    prompts = np.random.default_rng(0).integers(VOCAB, size=(12, 60)).tolist()
    requests = [Request(prompt_ids=prompt, seed=i) for i, prompt in enumerate(prompts)]
    with NativeEngine(random_model(), max_slots=3, max_length=128, decode_chunk=3, eos_token_ids=[EOS]) as engine:
        completions = engine.generate(requests, SamplingParams(max_tokens=5))
    jax.effects_barrier()
    programs.programs_of.cache_clear()
    assert {len(completion.token_ids) for completion in completions} >= {2, 5}
    assert max(position for position, _ in seen) == 63
    assert all(position < window for position, window in seen)


def test_matrices_are_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 with float32 parameters: vectors, as of norms, are used as they are kept.

    The gap is the compiler's, which may leave out a rounding that is made where a matrix is used.
    """
    model = random_model(dtype=jnp.bfloat16)
    requests, sampling = random_requests(3), SamplingParams(max_tokens=6, seed=1)
    with NativeEngine(model, max_slots=4, max_length=32) as engine:
        cast = own_leaves(engine._programs, engine._leaves, "bfloat16")
        assert {leaf.dtype for leaf in cast if leaf.ndim > 1} == {jnp.dtype("bfloat16")}
        assert {leaf.dtype for leaf in cast if leaf.ndim < 2} == {jnp.dtype("float32")}
        once = engine.generate(requests, sampling)
    programs.programs_of.cache_clear()
    monkeypatch.setattr(programs, "own_copy", lambda params, *_, **__: (None,) * len(jax.tree.leaves(params)))
    with NativeEngine(model, max_slots=4, max_length=32) as engine:
        each = engine.generate(requests, sampling)
    programs.programs_of.cache_clear()
    assert tokens_of(once) == tokens_of(each)
    for a, b in zip(once, each):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)
