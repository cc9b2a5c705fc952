"""Requests and completions between engine and servers, with a server whose model is a table of 17 lines."""

import dataclasses
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxrft import models
from jaxrft.config import ConfigError
from jaxrft.rollout import Completion, Request, SamplingParams
from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.vllm.engine import VLLMEngine
from jaxrft.rollout.vllm.wire import Wire, cut_at_stop, joined, knows_logprobs, mode_for, request_seed
from tests.rollout.fake_server import FakeServer, logprob
from tests.rollout.tiny import SPEC, random_model

LETTERS = "abcdefghijklmnopq"


def decode(tokens):
    return "".join(LETTERS[token] for token in tokens)


class Tokenizer:
    eos_token_id = 3

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens is False
        return decode(tokens)


# ------------------------------------------------------------------ what is sent


def wire_of(**changes):
    return Wire(**{"mode": "processed_logprobs", "eos_ids": (3,), "max_length": 20, "decode": decode} | changes)


def test_payload():
    sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, max_tokens=8, stop_token_ids=[7, 5])
    payload = wire_of().payload(np.array([1, 2]), 3, 77, sampling)
    assert payload == {
        "token_ids": [1, 2],
        "sampling_params": {
            "n": 3, "seed": 77, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "max_tokens": 8,
            "min_tokens": 0, "stop_token_ids": [3, 5, 7], "ignore_eos": True, "logprobs": 0, "detokenize": False,
            "output_kind": 2,
        },
    }  # fmt: skip
    assert all(type(token) is int for token in payload["token_ids"])


def test_payload_of_other_samplings():
    greedy = wire_of().payload([1], 1, 77, SamplingParams(temperature=0, ignore_eos=True))["sampling_params"]
    assert "seed" not in greedy
    assert greedy["stop_token_ids"] == []
    # Several greedy completions are all the same, and asked for once.
    assert wire_of().payload([1], 3, 77, SamplingParams(temperature=0))["sampling_params"]["n"] == 1
    same = wire_of().completions(answer([4, 5]), 3, SamplingParams(temperature=0))
    assert [c.token_ids for c in same] == [[4, 5]] * 3
    assert "seed" not in wire_of(seeds=False).payload([1], 1, 77, SamplingParams())["sampling_params"]
    # Of 20 places the prompt takes 15.
    cut = wire_of().payload([1] * 15, 1, 0, SamplingParams(max_tokens=9, min_tokens=7))["sampling_params"]
    assert (cut["max_tokens"], cut["min_tokens"]) == (5, 5)
    stops = wire_of().payload([1], 1, 0, SamplingParams(stop=["ab", "c"]))["sampling_params"]
    assert stops["stop"] == ["ab", "c"]
    assert (stops["detokenize"], stops["skip_special_tokens"], stops["include_stop_str_in_output"]) == (
        True,
        False,
        True,
    )


def test_seeds():
    """One a request, of its own seed or else its place; the same in every run."""

    def seeds(sampling_seed):
        sampling = SamplingParams(seed=sampling_seed)
        own = [Request(prompt_ids=[1], seed=seed) for seed in (0, 1, 2, 2**63, 2**63 + 1, -1)]
        found = [request_seed(sampling, request, 5) for request in own]
        found += [request_seed(sampling, Request(prompt_ids=[1]), place) for place in range(3)]
        return found + [request_seed(sampling, own[0], 0, *more) for more in ((0,), (1, 0), (1, 1), (1, 0, 0))]

    both = [seeds(0), seeds(1)]
    assert both == [seeds(0), seeds(1)]
    flat = [*both[0], *both[1]]
    # Far apart, as completion i of a group is drawn with the seed plus i; and fit for a signed integer of 64 bits.
    gaps = np.diff(sorted(flat))
    assert gaps.min() > 10**6
    assert 0 <= min(flat) <= max(flat) < 2**62
    request = Request(prompt_ids=[1], seed=4)
    assert request_seed(SamplingParams(), request, 0) == request_seed(SamplingParams(), request, 9)


TRUNCATED = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"min_tokens": 2}]


@pytest.mark.parametrize("truncation", TRUNCATED)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("first", [None, 0.7, 1.0])
def test_when_log_probabilities_are_known(temperature, first, truncation):
    """Raw ones where nothing is divided by, those of what was drawn from where nothing is left out."""
    sampling = SamplingParams(temperature=temperature, first_token_temperature=first, **truncation)
    divides = temperature == 0.7 or first == 0.7
    assert knows_logprobs("raw_logprobs", sampling) == (not divides)
    assert knows_logprobs("processed_logprobs", sampling) == (not truncation)
    assert mode_for([temperature, first or temperature]) == ("processed_logprobs" if divides else "raw_logprobs")


# ------------------------------------------------------------------ what comes back


def answer(tokens, reason="length", versions=("4", "4"), **more):
    content = [{"logprob": -0.1 * (i + 1)} for i in range(len(tokens))]
    choice = {"index": 0, "token_ids": tokens, "logprobs": {"content": content}, "finish_reason": reason}
    return {"choices": [choice | more], "versions": list(versions)}


def read(reply, sampling=None, **changes):
    (completion,) = wire_of(**changes).completions(reply, 1, sampling or SamplingParams())
    return completion


def test_an_answer_that_lacks_completions():
    """As older servers give it where one of a group ends before the others."""
    with pytest.raises(EngineError, match="gave 1 completions of 2"):
        wire_of().completions(answer([1]), 2, SamplingParams())


def test_versions():
    """The server's own spans where it has them, which may differ; else those before and after, which must not."""
    assert read(answer([1, 2])).versions == ((0, 4),)
    spans = [{"start": 0, "version": "4"}, {"start": 1, "version": "5"}]
    assert read(answer([1, 2], versions=("4", "5"), weight_versions=spans)).versions == ((0, 4), (1, 5))
    with pytest.raises(EngineError, match="from version 4 to 5 while a request ran"):
        read(answer([1, 2], versions=("4", "5")))


def test_completion():
    completion = read(answer([1, 3], "stop"))
    assert (completion.token_ids, completion.finish_reason) == ([1, 3], "stop")
    assert completion.logprobs.dtype == np.float32
    np.testing.assert_allclose(completion.logprobs, [-0.1, -0.2], rtol=1e-6)
    assert [read(answer([1], reason)).finish_reason for reason in ("length", "abort", None)] == [
        "length", "abort", "abort",
    ]  # fmt: skip
    empty = read({"choices": [{"index": 0, "token_ids": None, "finish_reason": "abort"}], "versions": ["4", "4"]})
    assert (empty.token_ids, len(empty.logprobs)) == ([], 0)
    with pytest.raises(EngineError, match="gave 1 log-probabilities for 2 tokens"):
        read(answer([1, 2], logprobs={"content": [{"logprob": -1}]}))


@pytest.mark.parametrize(
    ("mode", "sampling", "knows", "sampled"),
    [
        ("processed_logprobs", {"temperature": 0.7}, True, True),
        ("processed_logprobs", {"temperature": 0.7, "top_k": 2}, False, True),
        ("raw_logprobs", {}, True, True),
        ("raw_logprobs", {"top_k": 2}, True, False),
        ("raw_logprobs", {"temperature": 0.7}, False, False),
        ("raw_logprobs", {"temperature": 0}, True, "zero"),
    ],
)
def test_which_log_probabilities_they_are(mode, sampling, knows, sampled):
    completion = read(answer([1, 2]), SamplingParams(**sampling), mode=mode)
    assert (completion.logprobs is not None) == knows
    assert (completion.sampled_logprobs is not None) == bool(sampled)
    if sampled == "zero":
        assert completion.sampled_logprobs.tolist() == [0, 0]


def completion_of(tokens, versions=((0, 1),), reason="length", known=True):
    logprobs = np.array([-token for token in tokens], np.float32)
    return Completion(
        token_ids=list(tokens),
        logprobs=logprobs if known else None,
        sampled_logprobs=2 * logprobs,
        finish_reason=reason,
        versions=versions,
    )


def test_joined():
    both = joined(completion_of([5]), completion_of([6, 7], ((0, 1), (1, 2)), "stop"))
    assert (both.token_ids, both.finish_reason, both.versions) == ([5, 6, 7], "stop", ((0, 1), (2, 2)))
    assert both.logprobs.tolist() == [-5, -6, -7]
    assert both.sampled_logprobs.tolist() == [-10, -12, -14]
    assert joined(completion_of([5]), completion_of([6], ((0, 2),))).versions == ((0, 1), (1, 2))
    assert joined(completion_of([5]), completion_of([6], known=False)).logprobs is None


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "end"),
    [
        ("abcde", ["cd"], 0, 4),
        ("abcde", ["x"], 0, None),
        ("abcde", ["e", "b"], 0, 2),
        # A stop text that ends within the first tokens does not count; one that ends behind them does.
        ("ababab", ["ab"], 2, 4),
        ("ababab", ["ab"], 3, 4),
        ("ababab", ["ab"], 6, None),
        ("", ["a"], 0, None),
    ],
)
def test_cut_at_stop(text, stop, min_tokens, end):
    tokens = [LETTERS.index(letter) for letter in text]
    whole = completion_of(tokens, ((0, 1), (3, 2)))
    cut = cut_at_stop(whole, SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=9), decode)
    assert cut.token_ids == tokens[:end]
    assert cut.finish_reason == ("length" if end is None else "stop")
    assert len(cut.logprobs) == len(cut.sampled_logprobs) == len(cut.token_ids)
    assert cut.versions == (((0, 1), (3, 2)) if end is None or end > 3 else ((0, 1),))


# ------------------------------------------------------------------ the engine on a server


@pytest.fixture
def server():
    return FakeServer()


def engine_on(*servers, model=None, max_length=20, **options):
    return VLLMEngine(servers, model or random_model(), Tokenizer(), max_length=max_length, **options)


def params_of(model):
    return nnx.split(model)[1]


@pytest.fixture
def engine(server):
    with engine_on(server) as made:
        made.update_weights(params_of(random_model()), 1)
        yield made


REQUESTS = [Request(prompt_ids=[n, n + 1], n=n + 1) for n in range(3)]
BEFORE = [request.prompt_ids[-1] for request in REQUESTS for _ in range(request.n)]


def expected_logprobs(before, tokens, first, rest):
    return [logprob(a, b, first if i == 0 else rest) for i, (a, b) in enumerate(itertools.pairwise([before, *tokens]))]


def test_generation(engine):
    progress = []
    sampling = SamplingParams(temperature=0.7, max_tokens=30, seed=1)
    completions = engine.generate(REQUESTS, sampling, lambda done, total: progress.append((done, total)))
    assert len(completions) == 6
    for before, completion, request in zip(BEFORE, completions, [r for r in REQUESTS for _ in range(r.n)]):
        np.testing.assert_allclose(
            completion.logprobs, expected_logprobs(before, completion.token_ids, 0.7, 0.7), rtol=1e-5
        )
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 3 else "length")
        assert len(completion.token_ids) <= 20 - len(request.prompt_ids)
        assert completion.versions == ((0, 1),)
    assert len({tuple(completion.token_ids) for completion in completions}) > 3
    assert sorted(total for _, total in progress) == [6, 6, 6]
    assert progress[-1] == (6, 6)
    again = engine.generate(REQUESTS, sampling)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]
    other = engine.generate(REQUESTS, dataclasses.replace(sampling, seed=2))
    assert [c.token_ids for c in other] != [c.token_ids for c in completions]
    assert engine.generate([], sampling) == []


@pytest.mark.parametrize("changes", [{}, {"min_tokens": 5}, {"max_tokens": 1}, {"temperature": 0.0}])
def test_first_tokens_at_their_own_temperature(engine, server, changes):
    sampling = SamplingParams(**{"temperature": 0.4, "max_tokens": 8, "seed": 3} | changes, first_token_temperature=2.0)
    progress = []
    requests = [Request(prompt_ids=[n], n=8) for n in range(6)]
    completions = engine.generate(requests, sampling, lambda *numbers: progress.append(numbers))
    for i, completion in enumerate(completions):
        tokens = completion.token_ids
        expected = expected_logprobs(i // 8, tokens, 2.0, sampling.temperature or 1)
        if completion.logprobs is None:
            assert sampling.min_tokens
        else:
            np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-5)
        assert 3 not in tokens[:-1]
        assert completion.finish_reason == ("stop" if tokens[-1] == 3 else "length")
        assert len(tokens) == sampling.max_tokens or tokens[-1] == 3
        assert len(tokens) >= sampling.min_tokens
    # Members of a group go on in their own ways, also from the same first token.
    ends = {(i // 8, *c.token_ids[:1]): set() for i, c in enumerate(completions)}
    for i, completion in enumerate(completions):
        ends[i // 8, completion.token_ids[0]].add(tuple(completion.token_ids[1:]))
    if not changes:
        assert max(map(len, ends.values())) > 1
    if sampling.max_tokens > 1:
        assert progress[-1] == (48, 48)
    assert [c.token_ids for c in engine.generate(requests, sampling)] == [c.token_ids for c in completions]
    assert server.payloads[0]["sampling_params"]["max_tokens"] == 1


@pytest.mark.parametrize("first", [None, 2.0])
def test_groups_are_told_of_as_they_are_finished(engine, first):
    """Each once and whole, as soon as it is there, and those that end with their first tokens too."""
    requests = [Request(prompt_ids=[n], n=n % 3 + 1) for n in range(12)]
    sampling = SamplingParams(max_tokens=8, seed=3, first_token_temperature=first)
    told, done = [], []
    completions = engine.generate(
        requests, sampling, lambda now, _: done.append(now), lambda *group: told.append((*group, max(done, default=0)))
    )
    starts = np.cumsum([0, *(request.n for request in requests)])
    assert sorted(place for place, _, _ in told) == list(range(12))
    for place, group, before in told:
        assert all(a is b for a, b in zip(group, completions[starts[place] : starts[place + 1]], strict=True))
        assert before < len(completions), "told of when all was done"
    if first:
        assert any(c.finish_reason == "stop" and len(c.token_ids) == 1 for _, group, _ in told for c in group)


def test_first_tokens_where_little_room_is_left(engine):
    """A prompt with room for one token gets one."""
    sampling = SamplingParams(max_tokens=5, first_token_temperature=2.0, ignore_eos=True)
    long, short = engine.generate([Request(prompt_ids=[1] * 19), Request(prompt_ids=[1] * 18)], sampling)
    assert (len(long.token_ids), len(short.token_ids)) == (1, 2)


def test_stop_texts(engine):
    """Also one that lies over the border of first token and rest."""
    requests = [Request(prompt_ids=[n], n=8) for n in range(10)]
    for first in (None, 2.0):
        sampling = SamplingParams(max_tokens=10, ignore_eos=True, first_token_temperature=first)
        plain = engine.generate(requests, sampling)
        stop = decode(plain[0].token_ids[:2])
        stopped = engine.generate(requests, dataclasses.replace(sampling, stop=[stop]))
        assert stopped[0].token_ids == plain[0].token_ids[:2]
        for cut, whole in zip(stopped, plain):
            end = decode(whole.token_ids).find(stop)
            assert cut.token_ids == (whole.token_ids if end < 0 else whole.token_ids[: end + 2])
            assert cut.finish_reason == ("length" if end < 0 else "stop")


def test_abort(engine, server):
    """What was not sent comes back empty, and marked."""
    started, generate = threading.Event(), server.generate

    def slow(payload):
        started.set()
        server_aborted.wait(20)
        return generate(payload)

    server_aborted = threading.Event()
    server.generate, server.abort = slow, server_aborted.set
    engine._generation._max_sequences = 1  # One request at a time: the others wait.
    aborting = threading.Thread(target=lambda: (started.wait(20), engine.abort()))
    aborting.start()
    told = []
    completions = engine.generate(REQUESTS, SamplingParams(max_tokens=4), on_finished=lambda *group: told.append(group))
    aborting.join()
    assert sorted((place, len(group)) for place, group in told) == [(0, 1), (1, 2), (2, 3)]
    assert len(completions) == 6
    assert [c.finish_reason for c in completions[1:]] == ["abort"] * 5
    assert [len(c.token_ids) for c in completions[1:]] == [0] * 5
    assert len(completions[0].token_ids) > 0
    engine.abort()


@pytest.mark.parametrize(
    ("requests", "sampling", "message"),
    [
        ([Request(prompt_ids=[1] * 20)], {}, "request 0: its prompt has 20 tokens"),
        ([Request(prompt_ids=[1]), Request(prompt_ids=[17])], {}, "request 1: its prompt holds token 17"),
        ([Request(prompt_ids=[1])], {"stop_token_ids": [17]}, "stop token 17"),
    ],
)
def test_requests_that_are_refused(engine, server, requests, sampling, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        engine.generate(requests, SamplingParams(**sampling))
    assert not server.payloads


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 2**28])
def test_servers_get_the_model(tmp_path, bucket_bytes):
    """What a saved model's file holds, and the output projection too where the server's is not tied."""
    servers = [FakeServer("a"), FakeServer("b")]
    with engine_on(*servers, bucket_bytes=bucket_bytes, checksum=True) as engine:
        assert (engine.version, engine.last_transfer, engine.transport) == (None, None, None)
        for version in (0, 1):
            model = random_model(seed=version)
            models.save(model, tmp_path / str(version))
            (file,) = (tmp_path / str(version)).glob("*.safetensors")
            expected = safetensors.numpy.load_file(file)
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
            engine.update_weights(params_of(model), version)
            assert (engine.version, engine.transport) == (version, "shared_memory")
            for server in servers:
                assert server.version == version
                assert server.tensors.keys() == expected.keys()
                for name, value in expected.items():
                    np.testing.assert_array_equal(server.tensors[name], value)
            assert engine.last_transfer.bytes == sum(value.nbytes for value in expected.values())
            assert (engine.last_transfer.buckets == 1) == (bucket_bytes == 2**28)
    assert all(server.calls.count("check") == server.calls.count("open") == 1 for server in servers)
    assert all(server.calls[-2:] == ["release", "close"] for server in servers)


def test_a_server_that_ties_its_embeddings():
    """On a GPU, where that works, the projection is not sent."""
    server = FakeServer(tied=True, device="GPU-1")
    with engine_on(server) as engine:
        engine.update_weights(params_of(random_model()), 0)
        assert "lm_head.weight" not in server.tensors
    untied = dataclasses.replace(SPEC, tie_embeddings=False)
    server = FakeServer()
    with engine_on(server, model=random_model(spec=untied)) as engine:
        engine.update_weights(params_of(random_model(spec=untied)), 0)
        assert server.tensors["lm_head.weight"].shape == (17, 16)


def test_nothing_is_generated_without_whole_weights(server):
    """Not before the first, and not after a transfer that failed, until one succeeds; what failed is looked at."""
    looked = []
    sampling = SamplingParams(max_tokens=2)
    with engine_on(server, on_failure=lambda: looked.append(1)) as engine:
        with pytest.raises(EngineError, match="no whole weights"):
            engine.generate(REQUESTS, sampling)
        for step in ("begin", "load", "finish"):
            engine.update_weights(params_of(random_model()), 1)
            assert engine.generate(REQUESTS, sampling)
            server.fail[step] = EngineError(f"fake: {step} failed")
            with pytest.raises(EngineError, match=f"{step} failed"):
                engine.update_weights(params_of(random_model()), 2)
            assert engine.version == 1
            with pytest.raises(EngineError, match="no whole weights"):
                engine.generate(REQUESTS, sampling)
        assert len(looked) == 3
        engine.update_weights(params_of(random_model()), 3)
        assert engine.generate(REQUESTS, sampling)[0].versions == ((0, 3),)
        # After each failure the memory is opened anew: the server may have been started again.
        assert server.calls.count("open") == 4


def test_a_transport_that_cannot_be_opened_is_tried_anew(server):
    """A new one is made the next time."""
    with engine_on(server) as engine:
        server.fail["open"] = EngineError("fake: open failed")
        with pytest.raises(EngineError, match="open failed"):
            engine.update_weights(params_of(random_model()), 1)
        engine.update_weights(params_of(random_model()), 2)
        assert server.version == 2


def test_a_server_that_ends_says_why(server):
    """In place of what the request met with."""

    def why():
        raise EngineError("fake ended with exit code 1: out of memory")

    with engine_on(server, on_failure=why) as engine:
        engine.update_weights(params_of(random_model()), 1)
        server.fail["generate"] = EngineError("fake: no answer")
        with pytest.raises(EngineError, match="out of memory"):
            engine.generate(REQUESTS, SamplingParams(max_tokens=2))


def test_weights_of_another_model(engine):
    other = random_model(spec=dataclasses.replace(SPEC, num_layers=3))
    with pytest.raises(ConfigError, match="^params: not the state of this engine's model"):
        engine.update_weights(params_of(other), 2)
    wider = random_model(spec=dataclasses.replace(SPEC, intermediate_size=48))
    with pytest.raises(ConfigError, match="^params: "):
        engine.update_weights(params_of(wider), 2)
    # The old ones are whole still.
    assert engine.generate(REQUESTS, SamplingParams(max_tokens=2))[0].versions == ((0, 1),)


def test_sharded_weights(run_python):
    code = """
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxrft.rollout.vllm.engine import VLLMEngine
from tests.rollout.fake_server import FakeServer
from tests.rollout.tiny import random_model

model, server = random_model(), FakeServer()
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
params = nnx.split(model)[1]
def split(p):
    return jax.device_put(p, NamedSharding(mesh, P("fsdp") if p.shape[0] % 8 == 0 else P()))
with VLLMEngine([server], model, max_length=20, bucket_bytes=2000) as engine:
    engine.update_weights(params, 0)
    whole = dict(server.tensors)
    engine.close()
server = FakeServer()
with VLLMEngine([server], model, max_length=20, bucket_bytes=2000) as engine:
    engine.update_weights(jax.tree.map(split, params), 0)
    assert whole.keys() == server.tensors.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(server.tensors[name], value)
"""
    run_python(code, devices=8)


# ------------------------------------------------------------------ sleep and end


def after_start(server):
    calls = list(server.calls)
    return calls[calls.index("finish") + 1 :]


def test_sleep_of_level_1():
    server = FakeServer(sleep=True)
    with engine_on(server) as engine:
        engine.update_weights(params_of(random_model()), 1)
        assert engine.sleeps
        engine.sleep()
        engine.sleep()
        with pytest.raises(RuntimeError, match="asleep"):
            engine.generate(REQUESTS, SamplingParams())
        engine.wake(["kv_cache"])
        with pytest.raises(RuntimeError, match="asleep"):
            engine.generate(REQUESTS, SamplingParams())
        engine.wake()
        assert engine.generate(REQUESTS, SamplingParams(max_tokens=1))
        assert after_start(server)[:3] == ["sleep 1", "wake kv_cache", "wake weights"]


def test_sleep_of_level_2():
    """Weights are gone: they have room again before new ones come, and nothing is generated until then."""
    server = FakeServer(sleep=True)
    with engine_on(server) as engine:
        engine.update_weights(params_of(random_model()), 1)
        engine.sleep(level=2)
        engine.wake()
        with pytest.raises(EngineError, match="no whole weights"):
            engine.generate(REQUESTS, SamplingParams())
        engine.sleep(level=2)
        engine.update_weights(params_of(random_model()), 2)
        calls = after_start(server)
        last = len(calls) - 1 - calls[::-1].index("sleep 2")
        assert calls[last + 1 : last + 3] == ["wake weights", "begin"]
        with pytest.raises(RuntimeError, match="asleep"):
            engine.generate(REQUESTS, SamplingParams())
        engine.wake()
        assert engine.generate(REQUESTS, SamplingParams(max_tokens=1))


def test_servers_that_cannot_sleep(engine, server):
    """Are told nothing; the engine keeps to its word all the same."""
    assert not engine.sleeps
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(REQUESTS, SamplingParams())
    engine.wake()
    assert engine.generate(REQUESTS, SamplingParams(max_tokens=1))
    assert not [call for call in server.calls if call.startswith(("sleep", "wake"))]
    with pytest.raises(ConfigError, match="^level: got 3, takes 1"):
        engine.sleep(3)
    with pytest.raises(ConfigError, match=r"^tags: got \['caches'\], takes weights and kv_cache"):
        engine.wake(["caches"])


def test_a_closed_engine(server):
    ended = []
    engine = engine_on(server, on_close=lambda: ended.append(1))
    engine.update_weights(params_of(random_model()), 1)
    engine.close()
    engine.close()
    assert server.calls[-2:] == ["release", "close"]
    assert ended == [1]
    for use in (
        lambda: engine.generate(REQUESTS, SamplingParams()),
        lambda: engine.update_weights(params_of(random_model()), 2),
        engine.sleep,
        engine.wake,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()


@pytest.mark.parametrize("field", ["dtype", "logprobs_mode", "model_type", "tied", "tokenizer"])
def test_servers_that_differ(field):
    values = {"dtype": "bfloat16", "logprobs_mode": "raw_logprobs", "model_type": "llama", "tied": True}
    values |= {"tokenizer": False}
    with pytest.raises(ConfigError, match=rf"^rollout\.vllm\.urls: {field} is {values[field]} at b, .* at a; start"):
        engine_on(FakeServer("a"), FakeServer("b", **{field: values[field]}))


def test_servers_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"^fake: takes 64 tokens .* needs 65 .* with --max-model-len 65"):
        engine_on(FakeServer(), max_length=65)
    with pytest.raises(ConfigError, match="^fake: ties its embeddings"):
        engine_on(FakeServer(tied=True))
    with pytest.raises(ConfigError, match=r"--max-model-len 64"):
        engine_on(FakeServer("a"), FakeServer("b", max_model_len=40), max_length=64)


def test_weights_go_in_the_servers_type():
    """Whatever type the trainer keeps them in; of the model only the shapes are looked at before."""
    server = FakeServer()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params_of(random_model()))
    with engine_on(server, model=nnx.eval_shape(lambda: random_model(dtype=jnp.bfloat16))) as engine:
        engine.update_weights(params, 0)
        assert {value.dtype for value in server.tensors.values()} == {np.dtype(np.float32)}
