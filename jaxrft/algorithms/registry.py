"""Recipes and objectives by name, and how users add their own."""

from __future__ import annotations

from jaxrft.algorithms.choices import require_choice
from jaxrft.algorithms.named_recipes import RECIPES
from jaxrft.algorithms.objectives import SURROGATES
from jaxrft.algorithms.recipe_parts import Recipe
from jaxrft.algorithms.surrogates import Surrogate


def recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(RECIPES)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    require_choice("recipe", name, recipes())
    return RECIPES[name]


_BUILT_IN = {"recipe": frozenset(RECIPES), "objective": frozenset(SURROGATES)}


def register_recipe(name: str, value: Recipe) -> None:
    """Adds a recipe, or replaces one that was added.

    Raises:
        ValueError: a recipe of this library has that name.
    """
    _add("recipe", RECIPES, name, value)


def register_objective(name: str, surrogate: Surrogate) -> None:
    """Adds an objective, which ``PolicyObjective(objective=name)`` then names, or replaces one that was added.

    Raises:
        ValueError: an objective of this library has that name.
    """
    _add("objective", SURROGATES, name, surrogate)


def _add(kind: str, known: dict, name: str, value: object) -> None:
    if name in _BUILT_IN[kind]:
        raise ValueError(f"{kind}: {name!r} is taken; choose another name")
    known[name] = value
