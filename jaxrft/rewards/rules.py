"""Rewards by rule. Each function here returns a reward that follows the contract of all rewards.

Options belong to the returned reward, so that a column of the dataset never changes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxrft.config import ConfigError

Reward = Callable[..., list[float | None]]
Completion = str | list[dict[str, Any]]


def exact_match(*, strip: bool = True, extract: str | None = None) -> Reward:
    """1 where the completion is the ``answer`` column, else 0; None where the row has no answer.

    Args:
        strip: leave white space at both ends out, of the completion and of the answer.
        extract: regular expression; what its first group (or, without groups, all of it) matches last
            in the completion is compared. 0 where it matches nothing.
    """
    pattern = _compile(extract) if extract is not None else None

    def exact_match(completions: list[Completion], answer: list[Any], **_: Any) -> list[float | None]:
        return [score(completion_text(c), a) for c, a in zip(completions, answer)]

    def score(text: str, answer: Any) -> float | None:
        if answer is None:
            return None
        if pattern is not None:
            found = list(pattern.finditer(text))
            if not found:
                return 0.0
            text = found[-1].group(1 if pattern.groups else 0) or ""
        wanted = answer_text(answer)
        return float(text.strip() == wanted.strip() if strip else text == wanted)

    return exact_match


def format_tags(*, tags: Sequence[str] = ("think", "answer"), prompt_opens: bool = False) -> Reward:
    """1 where the completion is ``<think>...</think> <answer>...</answer>`` and nothing else, else 0.

    Each tag opens and closes exactly once, in this order; between and around them there is only white space.

    Args:
        tags: names of the tags.
        prompt_opens: the chat template has opened the first tag already, so the completion must not.
    """
    if isinstance(tags, str) or not tags or len(set(tags)) < len(tags):
        raise ConfigError(f"rewards.arguments.format_tags.tags: got {tags!r}, takes a list of different names")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]

    def format_tags(completions: list[Completion], **_: Any) -> list[float | None]:
        return [float(follows(completion_text(c))) for c in completions]

    def follows(text: str) -> bool:
        text = marks[0] + text if prompt_opens else text
        if any(text.count(mark) != 1 for mark in marks):
            return False
        starts = [text.index(mark) for mark in marks]
        if starts != sorted(starts):
            return False
        # What stands before the first tag, between a tag's end and the next one's start, and after the last.
        ends = [0, *(start + len(mark) for start, mark in zip(starts, marks))][::2]
        return all(not text[end:start].strip() for end, start in zip(ends, [*starts[::2], len(text)]))

    return format_tags


def format_boxed(*, single: bool = False) -> Reward:
    r"""1 where the completion holds a ``\boxed{...}`` with balanced braces that is not empty, else 0.

    Args:
        single: exactly one of them; else at least one.
    """

    def format_boxed(completions: list[Completion], **_: Any) -> list[float | None]:
        counts = [len(boxed(completion_text(c))) for c in completions]
        return [float(count == 1 if single else count >= 1) for count in counts]

    return format_boxed


def length(*, target: int | None = None, maximum: int | None = None, buffer: int | None = None) -> Reward:
    """A reward of the completion's number of tokens ``n``, its end-of-sequence token included.

    With ``target``: ``max(0, 1 - |n - target| / target)``, which is 1 at the target and falls in a line to 0
    at none and at twice the target. With ``maximum`` and ``buffer``: 0 up to ``maximum - buffer``
    tokens, then falling in a line to -1 at ``maximum`` and beyond (the soft overlong punishment of
    DAPO, arXiv:2503.14476).

    Args:
        target: tokens wanted.
        maximum: tokens from which on the penalty is full, in place of ``target``.
        buffer: tokens over which the penalty grows, 1 to ``maximum``.
    """
    where = "rewards.arguments.length"
    if (target is None) == (maximum is None) or (maximum is None) != (buffer is None):
        raise ConfigError(f"{where}: takes either target, or maximum and buffer")
    if target is not None and target < 1:
        raise ConfigError(f"{where}.target: got {target}, takes at least 1")
    if maximum is not None and buffer is not None and not 1 <= buffer <= maximum:
        raise ConfigError(f"{where}.buffer: got {buffer}, takes 1 to maximum ({maximum})")

    def length(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [score(len(ids)) for ids in completion_ids]

    def score(count: int) -> float:
        if maximum is not None and buffer is not None:
            return min(0.0, max(-1.0, (maximum - buffer - count) / buffer))
        assert target is not None
        return max(0.0, 1.0 - abs(count - target) / target)

    return length


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or what its messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)


def answer_text(answer: Any) -> str:
    """An answer as text; a whole number that a table holds as a float is written as a whole number."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    return str(answer)


def boxed(text: str) -> list[str]:
    r"""What stands in the outermost ``\boxed{...}`` of a text, where braces balance and it is not blank."""
    open_braces: list[re.Match[str]] = []
    boxes: list[tuple[int, int, int]] = []
    # One pass, so that a text of nothing but opening braces takes no quadratic time.
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            open_braces.append(mark)
        elif mark[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{":
                while boxes and boxes[-1][0] > opening.start():  # those inside this one
                    boxes.pop()
                boxes.append((opening.start(), opening.end(), mark.start()))
    return [text[start:end] for _, start, end in boxes if text[start:end].strip()]


# A box opens; an escaped character, brace or not; a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"rewards.arguments.exact_match.extract: {pattern!r} is no regular expression: {error}"
        ) from error
