"""Texts that end a completion, wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jaxrft.rollout import NativeEngine, SamplingParams
from jaxrft.rollout.stopping import stop_text_end
from tests.rollout.tiny import VOCAB, random_requests

PIECES = ["a", "b", "ab", "ba", " ", "a b", "", "abab", "é", "x", "y", "xy", "\n", "bb", "aa", "z", "yx"]


class PieceTokenizer:
    """One text a token; token 9 ends."""

    eos_token_id = 9

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(PIECES[token] for token in tokens)


def expected_end(decode, tokens: Sequence[int], stops: Sequence[str], min_tokens: int) -> int | None:
    """By hand: the first prefix longer than ``min_tokens`` tokens with a stop text that the first
    ``min_tokens`` do not hold whole."""
    for end in range(min_tokens + 1, len(tokens) + 1):
        text, known = decode(tokens[:end]), len(decode(tokens[:min_tokens]))
        if any(text.find(stop, max(0, known - len(stop) + 1)) >= 0 for stop in stops):
            return end
    return None


@pytest.mark.parametrize(("chunk", "min_tokens"), [(3, 0), (8, 9)])
def test_completions_end_with_the_token_that_completes_a_stop_text(model, chunk, min_tokens) -> None:
    assert len(PIECES) == VOCAB
    tokenizer, stops = PieceTokenizer(), ("bxy", "abab", "é\n", " aa")
    requests = random_requests(16, seed=2)
    options = {"temperature": 1.3, "max_tokens": 18, "min_tokens": min_tokens, "seed": 5}

    def generate(**more):
        with NativeEngine(model, tokenizer, max_slots=8, max_length=32, decode_chunk=chunk) as engine:
            return engine.generate(requests, SamplingParams(**options, **more))

    spanning = 0
    for whole, cut in zip(generate(), generate(stop=stops)):
        tokens = whole.token_ids
        end = expected_end(lambda t: tokenizer.decode(t, False), tokens, stops, min_tokens)
        assert cut.token_ids == tokens[:end]
        assert cut.finish_reason == ("stop" if end is not None else whole.finish_reason)
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[:end], atol=1e-5)
        spanning += end is not None and PIECES[tokens[end - 1]] not in stops
    assert spanning >= 2


def test_any_split_into_chunks_finds_the_same_end() -> None:
    """Tokens that are single bytes of UTF-8: characters and stop texts are never whole."""

    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        text = "".join(rng.choice(list("aé→𝄞b")) for _ in range(40))
        tokens = list(text.encode())
        stops = ["".join(rng.choice(list("aé→𝄞b")) for _ in range(rng.integers(1, 5))) for _ in range(2)]
        min_tokens = int(rng.integers(0, 20))
        known = len(bytes(tokens[:min_tokens]).decode("utf-8", "ignore"))
        expected = next(
            (
                end
                for end in range(min_tokens + 1, len(tokens) + 1)
                if any(decode(tokens[:end]).find(s, max(0, known - len(s) + 1)) >= 0 for s in stops)
            ),
            None,
        )
        seen, end = 0, None
        while end is None and seen < len(tokens):
            reach = min(seen + int(rng.integers(1, 9)), len(tokens))
            end = stop_text_end(decode, tokens[:reach], max(seen, min_tokens), stops)
            seen = reach
        assert end == expected
        found += end is not None
    assert 100 < found < 300


def test_tokens_without_text_do_not_hide_a_stop_text() -> None:
    def decode(tokens: Sequence[int]) -> str:
        return "".join("ab"[token] if token < 2 else "" for token in tokens)

    tokens = [0, *[2] * 50, 1, *[2] * 30, 1]
    assert stop_text_end(decode, tokens, 60, ["abb"]) == len(tokens)
    assert stop_text_end(decode, tokens, 51, ["ab"]) == 52
    assert stop_text_end(decode, tokens, 52, ["ab"]) is None
