"""Finding where a stop text ends a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character of UTF-8 has up to four bytes, each of which may be a token: whole characters need this context.
CHARACTER_TOKENS = 4


def stop_text_end(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], seen: int, stops: Sequence[str]
) -> int | None:
    """How many tokens of a completion stand up to and with the one that completes a stop text.

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
    # A token stands for at least a byte: a stop text cannot reach further back than its bytes.
    start = max(0, seen - max(len(stop.encode()) for stop in stops) - CHARACTER_TOKENS)
    known = len(decode(tokens[start:seen]).rstrip("\ufffd"))

    def complete(end: int) -> bool:
        text = decode(tokens[start:end])
        return any(text.find(stop, max(0, known - len(stop) + 1)) >= 0 for stop in stops)

    if not complete(len(tokens)):
        return None
    return next(end for end in range(seen + 1, len(tokens) + 1) if complete(end))
