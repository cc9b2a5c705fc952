"""Finding where a stop text ends a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Text at the start of a window of tokens may differ from what it is in the whole: a character of UTF-8 may be
# cut (it has up to four bytes, each may be a token), and some tokenizers drop a leading space.
CONTEXT = 4


def stop_text_end(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], seen: int, stops: Sequence[str]
) -> int | None:
    """How many tokens of a completion stand up to and with the one that completes a stop text.

    Only a window of the last tokens is decoded, so that the cost does not grow with the completion.

    Args:
        decode: text of a list of tokens.
        tokens: the completion so far.
        seen: occurrences that end within this many first tokens do not count.
        stops: stop texts.

    Returns:
        None where no stop text is complete.
    """
    if seen >= len(tokens):
        return None
    start, before = _window_before(decode, tokens[:seen], max(map(len, stops)) + CONTEXT)

    def complete(end: int) -> bool:
        text = decode(tokens[start:end])
        return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stops)

    if not complete(len(tokens)):
        return None
    return next(end for end in range(seen + 1, len(tokens) + 1) if complete(end))


def _window_before(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], wanted: int) -> tuple[int, int]:
    """Where the last tokens with at least ``wanted`` characters start, and how many characters they have."""
    back = wanted
    while True:
        start = max(0, len(tokens) - back)
        # The last character may not be whole yet: it is not text so far.
        characters = len(decode(tokens[start:]).rstrip("\ufffd"))
        if start == 0 or characters >= wanted:
            return start, characters
        back *= 2
