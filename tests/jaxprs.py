"""What a traced program consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.extend.core


def equations(jaxpr: Any, turns: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, those of inner programs too, and how often its loops of known length run it."""
    for equation in jaxpr.eqns:
        yield equation, turns
        inside = turns * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner, inside)


def count(jaxpr: Any, primitive: str) -> int:
    """Occurrences of a primitive; a loop's body counts once."""
    return sum(equation.primitive.name == primitive for equation, _ in equations(jaxpr))


def product_flops(jaxpr: Any) -> int:
    """Of all matrix products."""
    total = 0
    for equation, turns in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += turns * 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    return total
