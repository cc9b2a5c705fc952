"""Text from models and datasets, made harmless for a terminal."""

from __future__ import annotations

import unicodedata

# Cc: control characters, among them the start of terminal commands. Cs: lone surrogates, which no
# encoding takes. Zl, Zp: line breaks that terminals disagree on.
_UNSAFE = frozenset({"Cc", "Cs", "Zl", "Zp"})
# These reorder the text around them (Trojan-source attacks); plain right-to-left text stays as it is.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Returns ``text`` with what could command a terminal spelled out, as in ``\x1b``.

    Line feeds and tabs stay. Characters that ``encoding`` lacks are spelled out too.
    """
    spelled = "".join(_spell(character) for character in text)
    return spelled.encode(encoding, "backslashreplace").decode(encoding)


def shorten(text: str, limit: int) -> str:
    """Returns the first ``limit`` characters, and how many more there are."""
    return text if len(text) <= limit else f"{text[:limit]}... (+{len(text) - limit} characters)"


def _spell(character: str) -> str:
    if character in "\n\t" or (character not in _REORDERING and unicodedata.category(character) not in _UNSAFE):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
