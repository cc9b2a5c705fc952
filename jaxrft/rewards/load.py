"""Rewards by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrft.config import ConfigError
from jaxrft.data.functions import check_arguments, load_function, names_function, nearest
from jaxrft.rewards.math_reward import MathReward
from jaxrft.rewards.rules import Reward, exact_match, format_boxed, format_tags, length

RULES: dict[str, Callable[..., Reward]] = {
    "exact_match": exact_match,
    "format_boxed": format_boxed,
    "format_tags": format_tags,
    "length": length,
}


def load_rewards(functions: Sequence[str], arguments: Mapping[str, Mapping[str, Any]], timeout: float) -> list[Reward]:
    """The rewards that a config names.

    Args:
        functions: ``exact_match``, ``math``, ``format_tags``, ``format_boxed``, ``length``, or one's own as
            ``package.module:function`` or ``file.py:function``.
        arguments: reward -> its keyword arguments; one's own goes by its function's name or as in
            ``functions``. They stand before columns of the same name.
        timeout: seconds that an answer may take a reward in a process of its own.

    Returns:
        a callable for each; its ``__name__`` is the reward's name in metrics.

    Raises:
        ConfigError: an unknown name, a function that cannot be loaded, arguments for a reward that is
            not listed or that it does not take.
    """
    keys = {key for source in functions for key in (source, source.rpartition(":")[2])}
    for key in arguments:
        if key not in keys:
            raise ConfigError(
                f"rewards.arguments: got {key!r}, takes a name from rewards.functions "
                f"({', '.join(functions)}){nearest(key, sorted(keys))}"
            )
    return [_load(source, arguments, timeout) for source in functions]


def _load(source: str, arguments: Mapping[str, Mapping[str, Any]], timeout: float) -> Reward:
    own = source.rpartition(":")[2]
    given = dict(arguments.get(source, {})) | (dict(arguments.get(own, {})) if own != source else {})
    field = f"rewards.arguments.{own}"
    if source == "math":
        check_arguments(MathReward, given, field)
        mathematics = MathReward(**({"timeout": timeout} | given))
        mathematics.start()  # what it imports, it imports while the model is loaded
        return mathematics
    if source in RULES:
        check_arguments(RULES[source], given, field)
        return RULES[source](**given)
    if not names_function(source):
        known = [*RULES, "math"]
        raise ConfigError(
            f"rewards.functions: got {source!r}, takes {', '.join(sorted(known))}, package.module:function "
            f"or file.py:function{nearest(source, known)}"
        )
    function = load_function(source, "rewards.functions")
    if not given:
        return function
    check_arguments(function, given, field)
    reward = functools.partial(function, **given)
    reward.__name__ = own  # type: ignore[attr-defined]
    return reward
